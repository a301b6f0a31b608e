"""The kernels of the CPU backend, compiled for a model's sizes and the format of its cache when it is first served.

Their inner loops are fast because their bounds are constants. They use whatever vector instructions the processor has.
vLLM needs a C++ compiler on CPU in any case, unless it is given ``--enforce-eager``.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from vllm import envs
from vllm.logger import init_logger

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat, Piece
from vllm_mla_plugin.latent_packing import tried_scales

logger = init_logger(f"vllm.{__name__}")

SOURCES = Path(__file__).parent
HEADERS = ("cpu_numbers.h", "cpu_rows.h", "cpu_tile.h")
SCALARS = {torch.float32: "float", torch.bfloat16: "Bfloat16", torch.float16: "_Float16"}
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class DecodeKernel:
    """MLA decode for one model's sizes.

    Args:
        library: the library that :func:`compile_kernel` made.
        latent: width of the output.
        scale: factor on the scores.
        means: of packed rows, what :func:`vllm_mla_plugin.backends.cpu_packed.mean_table` makes.
    """

    def __init__(self, library: ctypes.CDLL, latent: int, scale: float, means: torch.Tensor | None = None) -> None:
        self._decode = library.decode
        self._decode.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int] * 2 + [ctypes.c_int64] * 2
        self._decode.argtypes += [ctypes.c_int, ctypes.c_float]
        self._decode.restype = None
        self._chunk = library.chunk_size()
        self._partial = library.partial_size()
        self._latent = latent
        self._scale = scale
        self._means = means

    def __call__(
        self, q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Attend with one query per sequence and head.

        Args:
            q: ``[sequences, heads, latent + rope]``.
            cache: ``[blocks, block_size, latent + rope]`` of the same dtype, or packed rows; blocks may lie apart.
            block_table: ``[sequences, blocks]`` int32.
            lengths: ``[sequences]`` int32, cached tokens of each.

        Returns:
            ``[sequences, heads, latent]`` in ``q``'s dtype.
        """
        q, lengths = q.contiguous(), lengths.contiguous()
        sequences, heads, _ = q.shape
        chunks = max(1, -(-int(lengths.max()) // self._chunk))
        workspace = q.new_empty(sequences * chunks * self._partial, dtype=torch.float32)
        output = q.new_empty(sequences, heads, self._latent)
        tensors = (q, cache, block_table, lengths, output, workspace)
        self._decode(
            *(tensor.data_ptr() for tensor in tensors),
            None if self._means is None else self._means.data_ptr(),
            sequences,
            chunks,
            block_table.stride(0),
            cache.stride(0),
            cache.shape[1],
            self._scale,
        )
        return output


def compile_kernel(
    heads: int, latent: int, rope: int, dtype: torch.dtype, format: CacheFormat | None = None
) -> ctypes.CDLL | None:
    """The decode kernel for these sizes and the format of the cache (None: not packed); see :func:`compile_library`."""
    return compile_library("cpu_decode.cpp", dtype, (f"-DHEADS={heads}", *_sizes(latent, rope), *_rows(format)))


def compile_packing(format: CacheFormat, dtype: torch.dtype) -> ctypes.CDLL | None:
    """What packs and unpacks rows; see :func:`compile_library`."""
    # The same codes as in torch, which does not contract products and sums.
    return compile_library("cpu_pack.cpp", dtype, ("-ffp-contract=off", *_sizes(*format.sizes), *_rows(format)))


@cache
def compile_library(source: str, dtype: torch.dtype, options: tuple[str, ...]) -> ctypes.CDLL | None:
    """A file of this folder as a library, from the cache on disk or newly compiled.

    Returns:
        None, after a warning, if it cannot be compiled or loaded.
    """
    compiler = os.environ.get("CXX", "g++")
    options = (*FLAGS, *options, f"-DSCALAR={SCALARS[dtype]}")
    texts = [(SOURCES / name).read_text() for name in (source, *HEADERS)]
    key = hashlib.sha256("\0".join((compiler, *options, *texts, processor())).encode()).hexdigest()[:16]
    library = Path(envs.VLLM_CACHE_ROOT) / "mla_cpu_kernels" / f"{Path(source).stem}-{key}.so"
    recipe = (compiler, *options, str(SOURCES / source))
    try:
        problem = None if library.exists() else run_compiler(recipe, library)
        if problem is None:
            return ctypes.CDLL(str(library))
    except OSError as error:  # the cache folder cannot be written, or nothing can be loaded from it
        problem = str(error)
    logger.warning("MLA is several times slower than it could be, without %s: %s", source, problem)
    return None


def _sizes(latent: int, rope: int) -> tuple[str, ...]:
    return f"-DLATENT={latent}", f"-DROPE={rope}"


def _rows(format: CacheFormat | None) -> tuple[str, ...]:
    """What ``cpu_rows.h`` wants to know of a format."""
    if format is None:
        return ()
    return f"-DROW={format.bytes_per_token}", f"-DPIECES={','.join(map(_initialiser, format.pieces))}"


def _initialiser(piece: Piece) -> str:
    """Of ``struct Piece``."""
    segment = piece.segment
    planes = ",".join(f"{{{plane.bits},{plane.shift},{plane.offset},{plane.stride}}}" for plane in piece.planes)
    tried = range(0) if segment.bits == 16 else tried_scales(segment)
    fields = (
        *(piece.first, segment.size, segment.bits, segment.group, segment.scaling.upper(), piece.scales, piece.zeros),
        *(tried.stop, tried.step, len(piece.planes), f"{{{planes}}}"),
    )
    return f"{{{','.join(map(str, fields))}}}"


def run_compiler(recipe: tuple[str, ...], library: Path) -> str | None:
    """Run a compiler. Returns one sentence that says what went wrong, or None."""
    if shutil.which(recipe[0]) is None:
        return f"the C++ compiler {recipe[0]!r} is not installed (another can be named in CXX)."
    library.parent.mkdir(parents=True, exist_ok=True)
    # The library is renamed when it is complete, because several processes may compile the same kernel at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder, library.name)
        command = [*recipe, "-o", str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            messages = [line for line in result.stderr.splitlines() if "error" in line]
            return f"{recipe[0]} failed: {messages[0] if messages else result.stderr}"
        unfinished.rename(library)
    return None


def processor() -> str:
    """The processor that ``-march=native`` compiles for. It is part of a kernel's key, because machines may share a
    cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(wanted)})])
