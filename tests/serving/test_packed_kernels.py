"""The CPU backend on packed rows, for every kind of format: against packing in torch, and attention in float64."""

from types import SimpleNamespace

import pytest
import torch
from support.packed import SPECS, as_read, fill_cache, make_packed_impl, random_layer
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonPrefillMetadata,
    build_mla_chunked_context_metadata,
)
from vllm.platforms import current_platform

from vllm_mla_plugin.backends import cpu, cpu_packed
from vllm_mla_plugin.backends.cpu_packed import PackedCPUMLAImpl
from vllm_mla_plugin.latent_packing import quantise
from vllm_mla_plugin.testing.layer import Sizes, reference

current_platform.import_kernels()
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = Sizes()
ODD = ("37x4g16+5x2g8c/6x6g6s", Sizes(heads=13, latent=42, rope=6, nope=80, v=80))
LENGTHS = [1, 31, 32, 33, 1024, 1025, 2100, 5]


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE[dtype], f"relative error {error:.1e}"


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compile_kernel", "compile_packing"):
        monkeypatch.setattr(cpu_packed, name, lambda *arguments: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_rows(spec: str, dtype: torch.dtype) -> None:
    """Packed as in torch: the same bytes. Sums of squares differ in their last bits, so of equally good scales another
    may be chosen, but hardly ever."""
    torch.manual_seed(0)
    format, mean, freqs = random_layer(spec)
    impl = make_packed_impl(SIZES, dtype, format, mean, freqs)
    assert impl.packing.library is not None
    new = (torch.randn(2000, 192) * torch.logspace(-2, 1.5, 2000)[:, None]).to(dtype)
    rows = torch.zeros(2000, format.bytes_per_token, dtype=torch.uint8)
    impl.packing.pack(new[:, :128], new[:, 128:], rows, torch.arange(2000))
    different = (rows != quantise(new, format)).any(-1)
    assert different.float().mean() <= 2e-3
    positions = torch.arange(4000)[::2]
    got = impl.packing.unpack(rows, torch.arange(2000), positions)
    impl.packing.library = None
    expected = impl.packing.unpack(rows, torch.arange(2000), positions)
    torch.testing.assert_close(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def check_decode(impl: PackedCPUMLAImpl, sizes: Sizes, dtype: torch.dtype) -> None:
    cache, table, sequences = fill_cache(impl, sizes, LENGTHS, dtype)
    q = torch.randn(len(LENGTHS), sizes.heads, sizes.latent + sizes.rope, dtype=dtype) / 4
    decode = SimpleNamespace(block_table=table, seq_lens=torch.tensor(LENGTHS, dtype=torch.int32))
    parts = q.split([sizes.latent, sizes.rope], dim=-1)
    got, _ = impl.forward_mqa(parts, cache, SimpleNamespace(decode=decode), None)
    for i, new in enumerate(sequences):
        keys = as_read(impl, new)[:, None].expand(-1, sizes.heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., : sizes.latent], impl.scale)
        assert_close(got[i : i + 1], expected, dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_decode(spec: str) -> None:
    torch.manual_seed(0)
    impl = make_packed_impl(SIZES, torch.float32, *random_layer(spec))
    assert impl.kernel is not None
    check_decode(impl, SIZES, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "torch"])
def test_decode_of_awkward_sizes(kernel: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if not kernel:
        without_compiler(monkeypatch)
    spec, sizes = ODD
    impl = make_packed_impl(sizes, dtype, *random_layer(spec))
    assert (impl.kernel is not None) == kernel
    check_decode(impl, sizes, dtype)


def test_decode_of_padding() -> None:
    """Sequences of length 0 pad a batch: zeros, without the mean."""
    torch.manual_seed(0)
    impl = make_packed_impl(SIZES, torch.bfloat16, *random_layer(SPECS[2]))
    cache, table, _ = fill_cache(impl, SIZES, [20, 1], torch.bfloat16)
    got = impl.kernel(torch.randn(2, 9, 192).bfloat16(), cache, table, torch.tensor([20, 0], dtype=torch.int32))
    assert got[0].isfinite().all() and not got[1].any()


PREFILLS = {
    "no-context": ([0, 0, 0, 0], [1, 300, 16, 77]),
    "context": ([32, 0, 520, 1500], [200, 40, 1, 31]),
    "few-new-tokens": ([900, 16, 400], [3, 1, 2]),
}


def check_prefill(impl: PackedCPUMLAImpl, sizes: Sizes, dtype: torch.dtype, case: str) -> None:
    contexts, lengths = PREFILLS[case]
    totals = [context + length for context, length in zip(contexts, lengths, strict=True)]
    cache, table, sequences = fill_cache(impl, sizes, totals, dtype)
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    chunked = build_mla_chunked_context_metadata(
        context_lens_cpu=torch.tensor(contexts, dtype=torch.int32),
        prefill_query_start_loc_cpu=starts,
        chunked_prefill_workspace=torch.empty(1024, sizes.latent + sizes.rope, dtype=dtype),
        chunked_prefill_workspace_size=1024,
        block_size=sizes.block,
        align_chunk_to_block=True,
        device=torch.device("cpu"),
        dcp_world_size=1,
        dcp_local_block_size=1,
        dcp_virtual_block_size=1,
    )
    prefill = MLACommonPrefillMetadata(table, starts, max(lengths), chunked)
    q = torch.randn(sum(lengths), sizes.heads, sizes.nope + sizes.rope, dtype=dtype) / 4
    new = torch.cat([x[context:] for x, context in zip(sequences, contexts, strict=True)])
    latent, k_rope = new.split([sizes.latent, sizes.rope], dim=-1)
    output = torch.empty(len(q), sizes.heads * sizes.v, dtype=dtype)
    impl.forward_mha(q, latent, k_rope[:, None], cache, SimpleNamespace(prefill=prefill), None, output)
    weight = impl.kv_b_proj.weight.double().view(sizes.heads, sizes.nope + sizes.v, sizes.latent)
    for i, sequence in enumerate(sequences):
        tokens, cached = slice(int(starts[i]), int(starts[i + 1])), as_read(impl, sequence)
        kv = torch.einsum("tl,hdl->thd", cached[:, : sizes.latent], weight)
        rope = cached[:, None, sizes.latent :].expand(-1, sizes.heads, -1)
        k = torch.cat((kv[..., : sizes.nope], rope), dim=-1)
        expected = reference(q[tokens], k, kv[..., sizes.nope :], impl.scale).flatten(1)
        assert_close(output[tokens], expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PREFILLS)
def test_prefill(case: str, dtype: torch.dtype) -> None:
    """New tokens are attended as they are packed, like those of earlier context."""
    torch.manual_seed(0)
    check_prefill(make_packed_impl(SIZES, dtype, *random_layer(SPECS[2])), SIZES, dtype, case)


@pytest.mark.parametrize("case", ["context", "few-new-tokens"])
def test_prefill_of_awkward_sizes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    without_compiler(monkeypatch)
    spec, sizes = ODD
    check_prefill(make_packed_impl(sizes, torch.float32, *random_layer(spec)), sizes, torch.float32, case)


def test_context_that_would_not_fit_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, keys of earlier context are never made: rows are read to latents only."""
    if not cpu.has_extend_kernel(torch.bfloat16):
        pytest.skip("vLLM's kernel does not run on this processor")
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "MAX_EXPANDED_BYTES", 0)
    monkeypatch.setattr(PackedCPUMLAImpl, "_expand", None)
    impl = make_packed_impl(SIZES, torch.bfloat16, *random_layer(SPECS[4]))
    check_prefill(impl, SIZES, torch.bfloat16, "context")
