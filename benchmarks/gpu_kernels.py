"""Measures the decode of one layer on a GPU: at which bandwidth it reads the cache, compared with a plain copy.

    python -m benchmarks.gpu_kernels [--sequences 64] [--length 8192]

Covers every kernel that this plugin chooses: 512 + 64 and 256 + 64, which vLLM's own kernels serve; sizes that they do
not serve; and packed rows of 512 + 64. It also compares the kernel that absorbs and rotates queries with a product and
a rotation. The dtype is bfloat16, pages are in random order, and calls run in CUDA graphs,
as in a server. The bytes of every cached token count once; of a copy, the bytes read and the bytes written count.

Then, for few sequences, it measures what follows: merging the parts of contexts and the product with W_UV, in two
launches and in one. The row's ``chosen`` says whether a server takes the one.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import triton.testing
import vllm
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

from benchmarks.common import RESULTS, plain_parser, write_result
from vllm_mla_plugin.backends.gpu import gpu_tiles
from vllm_mla_plugin.backends.gpu_absorb import absorb
from vllm_mla_plugin.backends.gpu_decode import suited_parts
from vllm_mla_plugin.backends.gpu_merge import Parts
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.latent_packing import quantise
from vllm_mla_plugin.testing.gpu import BLOCK, Case, Packing, impl_for
from vllm_mla_plugin.testing.layer import absorption

CASES = {
    "llama-3-8b, 512 + 64": Case(512, 64, nope=128, v=128, heads=32),
    "llama-3-8b, 256 + 64": Case(256, 64, nope=128, v=128, heads=32),
    "llama-3-8b, 448 + 64": Case(448, 64, nope=128, v=128, heads=32),
    "llama-3-8b, 960 + 64": Case(960, 64, nope=128, v=128, heads=32),
    "qwen2.5-0.5b, 192 + 64": Case(192, 64, nope=64, v=64, heads=14),
    "smollm2, 128 + 64": Case(128, 64, nope=64, v=64, heads=9),
    "smollm2, 128 + 32": Case(128, 32, nope=64, v=64, heads=9),
}
FORMATS = {
    "4 bits, int8 rotary key": "512x4g64/64x8g64s",
    "8 bits": "512x8g64s/64x8g64s",
    "16 bits": "512x16/64x16",
}
PACKED = {
    f"llama-3-8b, 512 + 64 packed, {bits}, {heads} heads": (
        Case(512, 64, nope=128, v=128, heads=heads),
        CacheFormat.parse(spec),
    )
    for bits, spec in FORMATS.items()
    for heads in (8, 16, 32)
}
MERGED = {
    **{name: CASES[name] for name in ("llama-3-8b, 448 + 64", "llama-3-8b, 960 + 64", "smollm2, 128 + 64")},
    "llama-3-8b on 4 GPUs, 448 + 64": Case(448, 64, nope=128, v=128, heads=8),
}
FEW = (1, 2, 4, 8, 16, 32, 128)
"""Sequences, on both sides of the bound for each case."""
DTYPE = torch.bfloat16
COPIED = 2**32  # bytes
ROWS = (1, 4, 16, 64, 256)  # queries that are absorbed


def milliseconds(run: Callable[[], Any]) -> float:
    """Median time of a call in a CUDA graph, as in a server: launching from Python takes longer than the call."""
    return triton.testing.do_bench_cudagraph(run, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per second that a plain copy reads and writes."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Outside of a CUDA graph, because a copy in a graph is another operation, and slower.
    taken = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * COPIED / taken * 1e3


@torch.inference_mode()
def decode(case: Case, format: CacheFormat | None, sequences: int, length: int) -> tuple[str, float, int]:
    """The backend's name, the milliseconds of one call, and the bytes of a cached token."""
    row = case.latent + case.rope
    packing = None
    if format is not None:
        mean, freqs = torch.randn(2, row), 10000.0 ** -torch.linspace(0, 1, case.rope // 2)
        packing = Packing(format, mean if format.mean else None, freqs, max_position=length)
    backend = impl_for(case, DTYPE, "auto", packing)
    each = -(-length // BLOCK)
    cache = torch.empty(sequences * each + 1, BLOCK, row, dtype=DTYPE, device="cuda").normal_()
    if format is not None:  # one page of tokens, again and again: what is read does not change the time
        cache = quantise(cache[:1], format).repeat(len(cache), 1, 1)
    table = (torch.randperm(sequences * each, device="cuda") + 1).int().view(sequences, each)
    q = torch.randn(sequences, case.heads, row, dtype=DTYPE, device="cuda")
    metadata = backend.metadata(cache, table, [length] * sequences)
    taken = milliseconds(lambda: backend.impl.forward_mqa(q, cache, metadata, backend.layer))
    return backend.name, taken, cache.shape[-1] * cache.itemsize


@torch.inference_mode()
def absorption_times(case: Case, rows: int) -> dict[str, float]:
    """Milliseconds to absorb and rotate queries: by this plugin's kernel, and by a product and vLLM's rotation."""
    arguments = absorption(case.heads, case.nope, case.latent, case.rope, rows, DTYPE)
    q, weight, positions, turns = (tensor.cuda() for tensor in arguments)
    turns = turns.to(DTYPE)
    out = torch.empty(rows, case.heads, weight.shape[-1], dtype=DTYPE, device="cuda")

    def apart() -> None:
        torch.bmm(q.transpose(0, 1), weight, out=out.transpose(0, 1))
        ops.rotary_embedding(positions, out[..., case.latent :], None, case.rope, turns, True)

    together = milliseconds(lambda: absorb(q, weight, positions, turns))
    return {"rows": rows, "together": round(together, 4), "apart": round(milliseconds(apart), 4)}


@torch.inference_mode()
def merging(case: Case, sequences: int, length: int) -> dict[str, Any]:
    """Milliseconds of merging and the product with W_UV for one token of each sequence, apart and together."""
    tiles = gpu_tiles(case.latent, case.rope, case.heads, "auto")
    count = suited_parts(sequences, case.heads, tiles, current_platform.num_compute_units())
    results = torch.randn(sequences, case.heads, count, case.latent + 1, device="cuda")
    lengths = torch.full((sequences,), length, dtype=torch.int32, device="cuda")
    parts = Parts(results, lengths, case.latent, DTYPE, tiles.tokens, lag=1)
    kv_b_proj = torch.randn(case.heads, case.nope + case.v, case.latent, dtype=DTYPE, device="cuda")
    weight = kv_b_proj[:, case.nope :].transpose(1, 2)
    out = torch.empty(sequences, case.heads * case.v, dtype=DTYPE, device="cuda")
    by_head = out.view(sequences, case.heads, case.v).transpose(0, 1)

    def apart() -> None:
        torch.bmm(parts.merge()[0].transpose(0, 1), weight, out=by_head)

    times = {"apart": milliseconds(apart), "together": milliseconds(lambda: parts.project(weight, out))}
    rounded = {f"{name}_milliseconds": round(taken, 5) for name, taken in times.items()}
    return {"sequences": sequences, "length": length, "chosen": parts.suits_projection(case.v)} | rounded


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=8192)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a GPU")
    copied = copy_bandwidth()
    rows = []
    cases = {name: (case, None) for name, case in CASES.items()} | PACKED
    for name, (case, format) in cases.items():
        backend, taken, token = decode(case, format, arguments.sequences, arguments.length)
        read = arguments.sequences * arguments.length * token
        bandwidth = read / taken * 1e3
        row = {"case": name, "backend": backend, "milliseconds": round(taken, 4)}
        rows.append(row | {"bytes_per_second": round(bandwidth), "share_of_copy": round(bandwidth / copied, 3)})
        print(rows[-1], flush=True)
    queries = [absorption_times(CASES["llama-3-8b, 512 + 64"], rows) for rows in ROWS]
    print(*queries, sep="\n")
    merged = []
    for (name, case), sequences, length in itertools.product(MERGED.items(), FEW, (1024, 8192)):
        merged.append({"case": name} | merging(case, sequences, length))
        print(merged[-1], flush=True)
    size = {"sequences": arguments.sequences, "length": arguments.length, "copy_bytes_per_second": round(copied)}
    values = {"vllm": vllm.__version__, **size, "rows": rows, "absorb_ms": queries, "merging": merged}
    write_result("gpu_kernels", "python -m benchmarks.gpu_kernels", values)
    print(f"written to {RESULTS / 'gpu_kernels.json'}")


if __name__ == "__main__":
    main()
