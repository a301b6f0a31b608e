"""Which attention backends serve a cache layout, on which hardware."""

from dataclasses import dataclass

from mla_converters.latent.cache_size import CacheBudget

HOPPER = "NVIDIA Hopper"
BLACKWELL = "NVIDIA Blackwell (data center)"
OTHER_GPU = "other NVIDIA GPU"
GPUS = (HOPPER, BLACKWELL, OTHER_GPU)

DEEPSEEK = CacheBudget(512, 64)
SMALL = CacheBudget(256, 64)


@dataclass(frozen=True)
class GpuBackend:
    """A dense MLA backend of vLLM.

    Attributes:
        name: as ``--attention-backend`` takes it.
        gpus: where it runs.
        layouts: what its kernel decodes.
        head_dims: sizes of the heads' part without RoPE (the source's head size) that it takes; empty for any.
    """

    name: str
    gpus: tuple[str, ...]
    layouts: tuple[CacheBudget, ...]
    head_dims: tuple[int, ...] = ()


# Read from vLLM 0.32.0: v1/attention/backends/mla/*.py and, for the order, which is that of vLLM's choice,
# platforms/cuda.py. MLACommonMetadata refuses every cached size but 320, 512 and 576 on any GPU. Among these:
# - FLASH_ATTN_MLA needs compute capability 9.x; FlashAttention 3 takes rope <= 64 with a latent >= 256.
# - FLASHMLA names 9.x and 10.x, but its dense kernel is "only supported on Hopper", and decodes 576.
# - FLASHINFER_MLA needs 10.x and a head size of 64, 128 or 192; FlashInfer takes 512 + 64 and 256 + 64.
# - CUTLASS_MLA needs 10.x and asserts 512 + 64.
# - TRITON_MLA runs anywhere. The tile sizes of its kernel fit these two layouts.
# All take float16 and bfloat16 only.
GPU_BACKENDS = (
    GpuBackend("FLASH_ATTN_MLA", (HOPPER,), (DEEPSEEK, SMALL)),
    GpuBackend("FLASHMLA", (HOPPER,), (DEEPSEEK,)),
    GpuBackend("FLASHINFER_MLA", (BLACKWELL,), (DEEPSEEK, SMALL), head_dims=(64, 128, 192)),
    GpuBackend("CUTLASS_MLA", (BLACKWELL,), (DEEPSEEK,)),
    GpuBackend("TRITON_MLA", GPUS, (DEEPSEEK, SMALL)),
)


def serving_backends(layout: CacheBudget, head_dim: int, dtype: str) -> dict[str, list[str]]:
    """Backends by hardware, vLLM's first choice first; only hardware that serves the layout.

    Args:
        layout: what is cached.
        head_dim: of the source.
        dtype: to serve in.
    """
    serving = {"CPU": ["any-size backend of this plugin"]}
    if dtype == "float32":
        return serving
    for gpu in GPUS:
        names = [
            backend.name
            for backend in GPU_BACKENDS
            if gpu in backend.gpus and layout in backend.layouts and head_dim in (backend.head_dims or (head_dim,))
        ]
        if names:
            serving[gpu] = names
    return serving
