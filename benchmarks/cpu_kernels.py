"""Compares the attention of one layer on a CPU: vLLM's for the source, this plugin's for half of the cache, and packed
rows with the same numbers in 16 bits.

    OMP_NUM_THREADS=1 python -m benchmarks.cpu_kernels [--repeats 15]

The sizes are SmolLM2's (9 heads, 3 KV heads of 64; 128 + 64 cached), in bfloat16. Decodes 1 and 16 sequences of several
lengths, and prefills one sequence of several lengths. Packed rows have the format that the search finds for a quarter
of the source's bytes: 192 + 192 numbers. The two attentions alternate, and the fastest call of each
counts, because other jobs may share the machine. Every call reads the next of several caches, as the layers of a model
do, so that no cache stays in the processor's own.
"""

import itertools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.model_executor.layers.attention.mla_attention import MLACommonPrefillMetadata
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from benchmarks.common import plain_parser, write_result
from vllm_mla_plugin.backends.cpu_kernel import DecodeKernel, compile_kernel
from vllm_mla_plugin.backends.cpu_packed import mean_table
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.latent_packing import quantise
from vllm_mla_plugin.testing.cpu import make_impl
from vllm_mla_plugin.testing.layer import Sizes

DTYPE = torch.bfloat16
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
SIZES = Sizes()
SOURCE_BLOCK = 128  # tokens of a page, vLLM's default
LAYERS = 6
PACKED = CacheFormat.parse(
    "16x5g16+64x4g16+64x3g16c+48x2g16c/16x5g16+16x4g16+48x3g16c+16x2g16c+16x5g16+16x4g16+48x3g16c+16x2g16c"
)


def pages(sequences: int, length: int, block: int) -> tuple[int, torch.Tensor]:
    """The number of pages that a cache needs, and a table ``[sequences, pages]`` of them in random order."""
    each = -(-length // block)
    return sequences * each + 1, (torch.randperm(sequences * each) + 1).int().view(sequences, each)


def source_attention(sequences: int, length: int, queries: int) -> Callable[[], Any]:
    """vLLM's attention for ``queries`` new tokens of each sequence, whose keys and values it writes first."""
    count, table = pages(sequences, length, SOURCE_BLOCK)
    isa = _get_attn_isa(DTYPE, SOURCE_BLOCK, HEAD_DIM, "auto")
    caches = itertools.cycle(torch.randn(LAYERS, count, KV_HEADS, 2 * SOURCE_BLOCK, HEAD_DIM, dtype=DTYPE).unbind())
    tokens = sequences * queries
    q, out = (torch.randn(tokens, HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    k, v = (torch.randn(tokens, KV_HEADS, HEAD_DIM, dtype=DTYPE) for _ in range(2))
    positions = torch.arange(length - queries, length)
    slots = (table[:, positions // SOURCE_BLOCK].long() * SOURCE_BLOCK + positions % SOURCE_BLOCK).flatten()
    starts = torch.arange(0, tokens + 1, queries, dtype=torch.int32)
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    common = {"seq_lens": lengths, "query_start_loc": starts, "causal": True, "dynamic_causal": None}
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=sequences,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=DTYPE,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        kv_cache_dtype="auto",
        **common,
    )

    def run() -> None:
        keys, values = next(caches).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, slots, isa)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            scale=HEAD_DIM**-0.5,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
            **common,
        )

    return run


def our_decode(sequences: int, length: int, sizes: Sizes = SIZES) -> Callable[[], Any]:
    """This plugin's attention for one new token of each sequence, on latents."""
    impl = make_impl(sizes, DTYPE)
    width = sizes.latent + sizes.rope
    count, table = pages(sequences, length, sizes.block)
    caches = itertools.cycle(torch.randn(LAYERS, count, sizes.block, width, dtype=DTYPE).unbind())
    q = torch.randn(sequences, sizes.heads, width, dtype=DTYPE)
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    metadata: Any = SimpleNamespace(decode=SimpleNamespace(block_table=table, seq_lens=lengths))
    return lambda: impl.forward_mqa(q, next(caches), metadata, None)  # type: ignore[arg-type]


def packed_decode(sequences: int, length: int) -> Callable[[], Any]:
    """The same on packed rows."""
    latent, rope = PACKED.sizes
    library = compile_kernel(HEADS, latent, rope, DTYPE, PACKED)
    assert library is not None
    means = mean_table(torch.randn(2, latent + rope), torch.rand(rope // 2), length)
    kernel = DecodeKernel(library, latent, HEAD_DIM**-0.5, means)
    count, table = pages(sequences, length, SIZES.block)
    numbers = torch.randn(LAYERS * SIZES.block, latent + rope)
    rows = quantise(numbers, PACKED).view(LAYERS, 1, SIZES.block, -1).repeat(1, count, 1, 1)
    caches = itertools.cycle(rows.unbind())
    q = torch.randn(sequences, HEADS, latent + rope, dtype=DTYPE)
    lengths = torch.full((sequences,), length, dtype=torch.int32)
    return lambda: kernel(q, next(caches), table, lengths)


def our_prefill(length: int) -> Callable[[], Any]:
    """This plugin's attention for one prompt, whose keys and values it expands from latents."""
    impl = make_impl(SIZES, DTYPE)
    count, table = pages(1, length, SIZES.block)
    cache = torch.zeros(count, SIZES.block, SIZES.latent + SIZES.rope, dtype=DTYPE)
    q = torch.randn(length, SIZES.heads, SIZES.nope + SIZES.rope, dtype=DTYPE)
    latent, k_rope = (torch.randn(length, size, dtype=DTYPE) for size in (SIZES.latent, SIZES.rope))
    output = torch.empty(length, SIZES.heads * SIZES.v, dtype=DTYPE)
    prefill = MLACommonPrefillMetadata(table, torch.tensor([0, length], dtype=torch.int32), length)
    metadata: Any = SimpleNamespace(prefill=prefill)
    return lambda: impl.forward_mha(q, latent, k_rope[:, None], cache, metadata, None, output)  # type: ignore[arg-type]


@torch.inference_mode()
def compare(repeats: int, **runs: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the fastest call of each of two, and their ratio: how many times as fast the second is."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for run, taken in zip(runs.values(), times.values(), strict=True):
            started = time.perf_counter()
            for _ in range(LAYERS):
                run()
            taken.append((time.perf_counter() - started) / LAYERS * 1e3)
    fastest = {f"{name}_ms": round(min(taken[1:]), 3) for name, taken in times.items()}
    first, second = fastest.values()
    return {**fastest, "ratio": round(first / second, 2)}


def main() -> None:
    """Measure, print, and write the result file."""
    parser = plain_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    current_platform.import_kernels()
    rows: list[dict[str, Any]] = []

    def measured(what: str, sequences: int, length: int, repeats: int, **runs: Callable[[], Any]) -> None:
        rows.append({"what": what, "sequences": sequences, "length": length, **compare(repeats, **runs)})
        print(rows[-1], flush=True)

    for size in ((1, 2048), (1, 6144), (16, 2048), (16, 6144)):
        measured("decode", *size, arguments.repeats, source=source_attention(*size, 1), mla=our_decode(*size))
    for length in (512, 2048, 6144):
        runs = {"source": source_attention(1, length, length), "mla": our_prefill(length)}
        measured("prefill", 1, length, max(2, arguments.repeats // 3), **runs)
    all_numbers = Sizes(latent=PACKED.sizes[0], rope=PACKED.sizes[1])
    for size in ((16, 2048), (16, 6144)):
        runs = {"in_16_bits": our_decode(*size, all_numbers), "packed": packed_decode(*size)}
        measured("decode packed rows", *size, arguments.repeats, **runs)
    threads = torch.get_num_threads()
    write_result("cpu_kernels", "python -m benchmarks.cpu_kernels", {"threads": threads, "rows": rows})


if __name__ == "__main__":
    main()
