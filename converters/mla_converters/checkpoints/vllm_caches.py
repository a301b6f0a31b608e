"""The formats in which vLLM itself can keep the source's cache, without a conversion: ``--kv-cache-dtype``."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

from mla_converters.checkpoints.shape import Shape
from vllm_mla_plugin.checkpoint.layouts import A100, BLACKWELL, GPUS, HOPPER, OTHER_GPU

FP8 = "fp8"
INT4 = "int4_per_token_head"
WIDE_CPU = "CPU (x86 with AVX-512)"


@dataclass(frozen=True)
class VllmCache:
    """A format of the source's cache.

    Attributes:
        name: what ``--kv-cache-dtype`` takes.
        head_bytes: bytes of a token's key and value in one KV head, by head size.
        served_on: the hardware that serves it, by head size.
        kept_layers: layers at each end of the model that vLLM leaves in 16 bits.
    """

    name: str
    head_bytes: Callable[[int], int]
    served_on: Callable[[int], tuple[str, ...]]
    kept_layers: int = 0

    def token_bytes(self, shape: Shape) -> int:
        """Bytes of a token in all layers."""
        kept = 2 * min(self.kept_layers, shape.layers // 2)
        packed = (shape.layers - kept) * shape.kv_heads * self.head_bytes(shape.head_dim)
        return packed + kept * 2 * shape.cached


def _fp8_on(head_dim: int) -> tuple[str, ...]:
    cpu = (WIDE_CPU,) if head_dim in CPU_HEADS else ()
    return (*cpu, *(gpu for gpu in GPUS if gpu != A100 or head_dim in FLASHINFER_HEADS))


def _nvfp4_on(head_dim: int) -> tuple[str, ...]:
    if head_dim not in FLASHINFER_HEADS:
        return ()
    return (BLACKWELL,) if head_dim == 64 else GPUS


def _rotated(gpus: tuple[str, ...]) -> Callable[[int], tuple[str, ...]]:
    """A Hadamard transform takes only powers of two."""
    return lambda head_dim: gpus if head_dim & (head_dim - 1) == 0 else ()


def _turboquant(key_bytes: Callable[[int], int], value_bits: int) -> Callable[[int], int]:
    """A value has a scale and a zero in float16. Rows have an even number of bytes."""
    return lambda head_dim: 2 * ceil((key_bytes(head_dim) + ceil(head_dim * value_bits / 8) + 4) / 2)


def _rotated_key(bits: int) -> Callable[[int], int]:
    """A rotated key has its norm in float16."""
    return lambda head_dim: ceil(head_dim * bits / 8) + 2


# Read from vLLM 0.32.0: config/cache.py, and v1/attention/backends/*.py. Left out are formats of the same bytes as one
# that is here (fp8_e5m2, nvfp4_4over6), and those of other hardware or of MLA (fp8_inc, ultraquant_4bit, *_ds_mla).
# - fp8: CPU_ATTN needs AVX-512. FLASH_ATTN takes it on Hopper, TRITON_ATTN from compute capability 8.9 on, and
#   FLASHINFER from 8.0 on, for its head sizes.
# - *_per_token_head: TRITON_ATTN, with one float32 scale for each token and head.
# - nvfp4: FLASHINFER, which misreads heads of 64 except on Blackwell. Blocks of 16 share a scale of 8 bits.
# - turboquant_*: TURBOQUANT, but not in the first and last two layers.
CPU_HEADS = (32, 64, 96, 128, 160, 192, 224, 256, 512)
FLASHINFER_HEADS = (64, 128, 256, 512)
VLLM_CACHES = (
    VllmCache(FP8, lambda d: 2 * d, _fp8_on),
    VllmCache("fp8_per_token_head", lambda d: 2 * d + 8, lambda _: (HOPPER, BLACKWELL, OTHER_GPU)),
    VllmCache("int8_per_token_head", lambda d: 2 * d + 8, lambda _: GPUS),
    VllmCache("turboquant_k8v4", _turboquant(lambda d: d, 4), _rotated(GPUS), kept_layers=2),
    VllmCache("turboquant_4bit_nc", _turboquant(_rotated_key(4), 4), _rotated(GPUS), kept_layers=2),
    VllmCache("nvfp4", lambda d: d + d // 8, _nvfp4_on),
    VllmCache(INT4, lambda d: d + 8, _rotated(GPUS)),
    VllmCache("turboquant_k3v4_nc", _turboquant(_rotated_key(3), 4), _rotated(GPUS), kept_layers=2),
    VllmCache("turboquant_3bit_nc", _turboquant(_rotated_key(3), 3), _rotated(GPUS), kept_layers=2),
)


def vllm_caches(shape: Shape) -> list[VllmCache]:
    """The formats that some hardware serves for heads of the source's size, largest first."""
    served = [cache for cache in VLLM_CACHES if cache.served_on(shape.head_dim)]
    return sorted(served, key=lambda cache: -cache.token_bytes(shape))
