"""Which attention backends serve a cache layout on which GPU: vLLM's own, or this plugin's Triton backend.

A layout is ``(kv_lora_rank, qk_rope_head_dim)``, called latent and rope here. In each layer, a token's cache is a row
of ``latent + rope`` numbers. On CPUs, this plugin's own backend serves every layout.

The plugin chooses a layer's backend by this module, and ``vllm-mla plan`` predicts that choice by it. So it imports
neither torch nor vLLM.
"""

from dataclasses import dataclass

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.row_chunks import padded_width

HOPPER = "NVIDIA Hopper"  # compute capability 9.0
BLACKWELL = "NVIDIA Blackwell (data center)"  # 10.x
A100 = "NVIDIA A100"  # 8.0
OTHER_GPU = "other NVIDIA GPU"  # 8.6, 8.9 and 12.x
SHARED_BYTES = {HOPPER: 227 << 10, BLACKWELL: 227 << 10, A100: 163 << 10, OTHER_GPU: 99 << 10}
"""Shared memory that one program of a kernel may take, by GPU (CUDA C++ Programming Guide, technical specifications per
compute capability)."""
GPUS = tuple(SHARED_BYTES)

DEEPSEEK = (512, 64)
SMALL = (256, 64)
VLLM_LAYOUTS = (DEEPSEEK, SMALL)
"""The layouts that vLLM's own GPU backends decode. vLLM then chooses the fastest backend for the GPU."""
VLLM_FP8_LAYOUTS = (DEEPSEEK,)
"""The same with a cache of 8-bit floats. 256 + 64 is missing because on Hopper vLLM would choose FlashMLA for it, which
then refuses it."""


@dataclass(frozen=True)
class GpuBackend:
    """A dense MLA backend of vLLM.

    Attributes:
        name: the name that ``--attention-backend`` takes.
        gpus: the GPUs that it runs on.
        layouts: the layouts that its kernel decodes.
        head_dims: the head sizes of the source that it takes; empty for any.
    """

    name: str
    gpus: tuple[str, ...]
    layouts: tuple[tuple[int, int], ...]
    head_dims: tuple[int, ...] = ()


# Read from vLLM 0.32.0, v1/attention/backends/mla/*.py. The order is that of vLLM's choice, in platforms/cuda.py.
# MLACommonMetadata refuses every cached size but 320, 512 and 576 on any GPU. Among these:
# - FLASH_ATTN_MLA needs compute capability 9.x. FlashAttention 3 takes rope <= 64 with a latent >= 256.
# - FLASHMLA names 9.x and 10.x, but its dense kernel is "only supported on Hopper", and decodes 576.
# - FLASHINFER_MLA needs 10.x and a head size of 64, 128 or 192. FlashInfer takes 512 + 64 and 256 + 64.
# - CUTLASS_MLA needs 10.x and asserts 512 + 64.
# - TRITON_MLA runs anywhere. The tile sizes of its kernel fit these two layouts.
# All take float16 and bfloat16 only.
VLLM_BACKENDS = (
    GpuBackend("FLASH_ATTN_MLA", (HOPPER,), (DEEPSEEK, SMALL)),
    GpuBackend("FLASHMLA", (HOPPER,), (DEEPSEEK,)),
    GpuBackend("FLASHINFER_MLA", (BLACKWELL,), (DEEPSEEK, SMALL), head_dims=(64, 128, 192)),
    GpuBackend("CUTLASS_MLA", (BLACKWELL,), (DEEPSEEK,)),
    GpuBackend("TRITON_MLA", GPUS, (DEEPSEEK, SMALL)),
)
PLUGIN_BACKEND = "this plugin's Triton backend"
"""Decodes the other layouts. The plugin gives it to the layers by itself; ``--attention-backend`` has no name for it.
It was run on an H200, and compiled for compute capabilities 8.0 and 8.9. Its kernels for packed rows were only
compiled, for 8.0, 8.9, 9.0 and 10.0."""
MAX_PREFILL_HEAD_SIZE = 256
"""Prefill on GPUs takes heads (nope + rope) of at most this size, because FlashAttention has no kernels for larger
ones and vLLM's other prefill backends take DeepSeek's sizes alone."""

MIN_TILE = 16  # Triton multiplies no smaller tiles
MAX_HEADS = 32  # of a program; more do not fit the registers


@dataclass(frozen=True)
class Tiles:
    """The tiles that one program of this plugin's decode kernel works on.

    Attributes:
        latent: columns of the first tile of cached rows, a power of 2. Values are a part of this tile.
        rope: columns of the second tile; 0 if the first takes whole rows.
        tokens: rows of both tiles.
        heads: query heads, all of one token.
    """

    latent: int
    rope: int
    tokens: int
    heads: int

    def shared_bytes(self, fp8: bool) -> int:
        """Shared memory that the kernel takes, as compiled for compute capability 8. For 9, wide rows take less.

        Args:
            fp8: whether the cache holds 8-bit floats, which the kernel first widens to 16 bits.
        """
        width = self.latent + self.rope
        widened = 2 * width * self.tokens + 16 * self.latent if fp8 else 0
        return 2 * width * (self.tokens + self.heads) + 16 * self.latent + widened

    @property
    def warps(self) -> int:
        """Warps of a program: the results of a wide latent do not fit the registers of four."""
        return 8 if self.latent >= 1024 else 4

    @property
    def programs_per_unit(self) -> int:
        """How many programs keep each of the GPU's units (SMs) busy."""
        return 4 if self.latent <= 256 else 2


def _tile(size: int) -> int:
    """The smallest tile that holds ``size`` numbers: Triton's tiles have sizes that are powers of 2."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())


def suited_tiles(latent: int, rope: int, heads: int, fp8: bool, shared_bytes: int) -> Tiles:
    """The tiles that were fastest on an H200. A GPU with less shared memory gets as many tokens and heads as fit.

    Whether a layout is refused does not depend on ``heads``.

    Raises:
        ValueError: a row is too wide for the shared memory.
    """
    first = _tile(latent)
    second = 0 if latent + rope <= first else _tile(rope)
    most = min(MAX_HEADS, _tile(heads))
    for tokens, together in ((64 if first <= 128 else 32, most), (32, MIN_TILE), (16, MIN_TILE)):
        tiles = Tiles(first, second, tokens, together)
        if tiles.shared_bytes(fp8) <= shared_bytes:
            return tiles
    raise ValueError(
        f"A token's cache of {latent} + {rope}{' fp8' if fp8 else ''} numbers in a layer is too wide for this GPU's "
        f"shared memory of {shared_bytes >> 10} KiB: convert with a smaller --kv-lora-rank."
    )


@dataclass(frozen=True)
class PackedTiles:
    """The tiles that one program of this plugin's decode kernel for packed rows works on.

    No GPU has run this kernel yet. The sizes were chosen by what it takes as compiled for compute capabilities 8.0 and
    9.0: with more tokens or heads, hundreds of bytes a thread no longer fit the registers.

    Attributes:
        width: numbers of a row, as the kernel pads them.
        tokens: rows of a tile.
        heads: query heads, all of one token.
        warps: of a program.
    """

    width: int
    tokens: int
    heads: int
    warps: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the kernel takes at most: a tile of rows in 16 bits twice, because scores and values read
        it in different orders; and the queries, which compilers keep in registers if a program has 8 warps."""
        return 4 * self.width * self.tokens + (2 * self.width * self.heads if self.warps == 4 else 0)

    @property
    def programs_per_unit(self) -> int:
        """How many programs fit the registers of each of the GPU's units (SMs)."""
        return 8 // self.warps


WIDEST_PACKED_LATENT = 2048
"""The widest latent that a search for a packed format considers: on A100 and later, tiles of wider rows do not fit."""


def packed_tiles(format: CacheFormat, shared_bytes: int) -> PackedTiles:
    """The tiles of packed rows. A GPU with less shared memory gets fewer tokens.

    Raises:
        ValueError: a row is too wide for the shared memory.
    """
    width = padded_width(format)
    for tokens in (32, 16):
        tiles = PackedTiles(width, tokens, MIN_TILE, 4 if format.sizes[0] <= 512 else 8)
        if tiles.shared_bytes <= shared_bytes:
            return tiles
    latent, rope = format.sizes
    raise ValueError(
        f"A token's packed cache of {latent} + {rope} numbers in a layer is too wide for this GPU's shared memory of "
        f"{shared_bytes >> 10} KiB: convert with a smaller --kv-lora-rank."
    )


def gpu_backends(
    layout: tuple[int, int],
    head_dim: int,
    dtype: str,
    gpu: str,
    format: CacheFormat | None = None,
    differ: bool = False,
) -> list[str]:
    """The backends that serve a layout on a GPU; vLLM's first choice comes first.

    Args:
        layout: latent and rope of a layer.
        head_dim: head size of the source; heads of the converted model have ``head_dim + rope`` numbers in prefill.
        dtype: of the model when it is served. No GPU backend for MLA takes float32.
        gpu: one of :data:`GPUS`.
        format: how the cache is packed, by which only this plugin's backend serves it; None if it is kept in the
            model's dtype.
        differ: whether other layers have other layouts, which only this plugin's backend serves.

    Returns:
        Names as ``--attention-backend`` takes them, or :data:`PLUGIN_BACKEND` alone; empty if nothing serves it.
    """
    if dtype == "float32" or head_dim + layout[1] > MAX_PREFILL_HEAD_SIZE:
        return []
    if format is None and not differ and layout in VLLM_LAYOUTS:
        return [
            backend.name
            for backend in VLLM_BACKENDS
            if gpu in backend.gpus and layout in backend.layouts and head_dim in (backend.head_dims or (head_dim,))
        ]
    try:
        if format is None:
            suited_tiles(*layout, heads=1, fp8=False, shared_bytes=SHARED_BYTES[gpu])
        else:
            packed_tiles(format, SHARED_BYTES[gpu])
    except ValueError:
        return []
    return [PLUGIN_BACKEND]
