"""The decode kernel of the CPU backend, compiled for a model's sizes when it is first served.

Its inner loops are fast because their bounds are constants. They use whatever vector instructions the processor has.
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

logger = init_logger(f"vllm.{__name__}")

SOURCE = Path(__file__).with_name("cpu_decode.cpp")
SCALARS = {torch.float32: "float", torch.bfloat16: "Bfloat16", torch.float16: "_Float16"}
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


class DecodeKernel:
    """MLA decode for one model's sizes.

    Args:
        library: the library that :func:`compile_kernel` made.
        latent: width of the output.
        scale: factor on the scores.
    """

    def __init__(self, library: ctypes.CDLL, latent: int, scale: float) -> None:
        self._decode = library.decode
        self._decode.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int] * 2 + [ctypes.c_int64] * 2
        self._decode.argtypes += [ctypes.c_int, ctypes.c_float]
        self._decode.restype = None
        self._chunk = library.chunk_size()
        self._partial = library.partial_size()
        self._latent = latent
        self._scale = scale

    def __call__(
        self, q: torch.Tensor, cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Attend with one query per sequence and head.

        Args:
            q: ``[sequences, heads, latent + rope]``.
            cache: ``[blocks, block_size, latent + rope]`` of the same dtype; blocks may lie apart.
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
            sequences,
            chunks,
            block_table.stride(0),
            cache.stride(0),
            cache.shape[1],
            self._scale,
        )
        return output


@cache
def compile_kernel(heads: int, latent: int, rope: int, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for these sizes, from the cache on disk or newly compiled.

    Returns:
        None, after a warning, if it cannot be compiled or loaded.
    """
    compiler = os.environ.get("CXX", "g++")
    sizes = (f"-DHEADS={heads}", f"-DLATENT={latent}", f"-DROPE={rope}", f"-DSCALAR={SCALARS[dtype]}")
    recipe = (compiler, *FLAGS, *sizes)
    key = hashlib.sha256("\0".join((*recipe, SOURCE.read_text(), processor())).encode()).hexdigest()[:16]
    library = Path(envs.VLLM_CACHE_ROOT) / "mla_cpu_kernels" / f"decode-{key}.so"
    try:
        problem = None if library.exists() else run_compiler(recipe, library)
        if problem is None:
            return ctypes.CDLL(str(library))
    except OSError as error:  # the cache folder cannot be written, or nothing can be loaded from it
        problem = str(error)
    logger.warning("MLA decodes several times slower than it could: %s", problem)
    return None


def run_compiler(recipe: tuple[str, ...], library: Path) -> str | None:
    """Compile ``SOURCE``. Returns one sentence that says what went wrong, or None."""
    if shutil.which(recipe[0]) is None:
        return f"the C++ compiler {recipe[0]!r} is not installed (another can be named in CXX)."
    library.parent.mkdir(parents=True, exist_ok=True)
    # The library is renamed when it is complete, because several processes may compile the same kernel at once.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        unfinished = Path(folder, library.name)
        command = [*recipe, str(SOURCE), "-o", str(unfinished)]
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
