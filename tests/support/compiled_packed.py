"""Compiles this plugin's Triton kernels for packed rows, and for queries, for GPUs that need not be there.

The argument holds cases as JSON: format, heads, dtype, compute capability. The kernels are launched as in a server, but
Triton is told of such a GPU, and stops after compiling. What each kernel takes of the GPU is printed as JSON. This runs
in a process of its own, because it changes Triton.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language
import vllm.triton_utils

# Without a GPU, vLLM has put an empty module in Triton's place.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language

from support.packed import random_layer
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vllm.platforms import current_platform

from vllm_mla_plugin.backends.gpu_absorb import absorb
from vllm_mla_plugin.backends.gpu_means import Means
from vllm_mla_plugin.backends.gpu_pack import pack
from vllm_mla_plugin.backends.gpu_packed_decode import EXTRA, decode_packed
from vllm_mla_plugin.backends.gpu_rows import widen
from vllm_mla_plugin.checkpoint.layouts import A100, BLACKWELL, HOPPER, OTHER_GPU, SHARED_BYTES, packed_tiles
from vllm_mla_plugin.testing.layer import absorption

type(current_platform).num_compute_units = classmethod(lambda cls, device_id=0: 132)

VALUES = 128  # ``v_head_dim``
GPUS = {80: A100, 89: OTHER_GPU, 90: HOPPER, 100: BLACKWELL}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled_only(capability: int) -> Iterator[list[Any]]:
    """Kernels launched meanwhile are compiled, and not run; the list gets them."""
    kernels: list[Any] = []
    driver.set_active(AbsentGPU(capability))
    launch = JITFunction.__getitem__

    def compile_instead(function: Any, grid: Any) -> Any:
        return lambda *args, **kwargs: kernels.append(function.run(*args, grid=grid, warmup=True, **kwargs))

    JITFunction.__getitem__ = compile_instead
    yield kernels
    JITFunction.__getitem__ = launch


def usage(kernel: Any) -> dict[str, int]:
    """Registers and bytes of local memory (spilled registers) of a thread; bytes of shared memory and warps of a
    program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", printed)}
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    return {"registers": numbers["REG"], "local": numbers["STACK"], "shared": shared, "warps": warps}


def compile_case(spec: str, heads: int, dtype: str, capability: int) -> dict[str, Any]:
    """Usage of each kernel, by its name; and what the tiles promise."""
    format, mean, freqs = random_layer(spec)
    (latent, rope), tiles = format.sizes, packed_tiles(format, SHARED_BYTES[GPUS[capability]])
    means = None if mean is None else Means.of(mean, freqs, 4096, tiles.tokens)
    new = torch.zeros(4, latent + rope, dtype=getattr(torch, dtype))
    q_latent, q_rope = torch.zeros(4, heads, latent, dtype=new.dtype), torch.zeros(4, heads, 3 + rope, dtype=new.dtype)
    cache, slots = torch.zeros(5, 16, format.bytes_per_token, dtype=torch.uint8), torch.arange(4)
    with compiled_only(capability) as kernels:
        q, weight, positions, turns = absorption(heads, 64, latent, rope, 4, new.dtype)
        absorb(q, weight, positions, turns.to(new.dtype))
        pack(new[:, :latent], new[:, latent:], cache, slots, format)
        widen(cache, slots, slots, format, means, new.dtype)
        parts = decode_packed(
            q_latent,
            q_rope[..., 3:],
            cache,
            torch.zeros(4, 2, dtype=torch.int32),
            torch.zeros(4, dtype=torch.int32),
            torch.zeros(4, heads, 2, latent + EXTRA),
            format,
            means,
            scale=1.0,
            causal=True,
            tiles=tiles,
        )
        parts.merge()
        weight = torch.zeros(heads, 2 * VALUES, latent, dtype=new.dtype)[:, VALUES:].transpose(1, 2)
        parts.project(weight, torch.zeros(4, heads * VALUES, dtype=new.dtype))
    return {"promised": tiles.shared_bytes} | {kernel.metadata.name: usage(kernel) for kernel in kernels}


if __name__ == "__main__":
    print(json.dumps({str(tuple(case)): compile_case(*case) for case in json.loads(sys.argv[1])}))
