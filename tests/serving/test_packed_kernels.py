"""The CPU backend on packed rows, for every kind of format: against packing in torch, and attention in float64."""

import pytest
import torch
from support.packed import SPECS, fill_cache, make_packed_impl, random_layer
from support.packed_attention import PREFILLS, TOLERANCE, check_decode, check_prefill
from vllm.platforms import current_platform

from vllm_mla_plugin.backends import cpu, cpu_packed
from vllm_mla_plugin.backends.cpu_packed import PackedCPUMLAImpl
from vllm_mla_plugin.latent_packing import quantise
from vllm_mla_plugin.testing.layer import Sizes

current_platform.import_kernels()
SIZES = Sizes()
ODD = ("37x4g16+5x2g8c/6x6g6s", Sizes(heads=13, latent=42, rope=6, nope=80, v=80))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PREFILLS)
def test_prefill(case: str, dtype: torch.dtype) -> None:
    """New tokens are attended as they are packed, like those of earlier context."""
    torch.manual_seed(0)
    check_prefill(make_packed_impl(SIZES, dtype, *random_layer(SPECS[2])), SIZES, dtype, *PREFILLS[case])


@pytest.mark.parametrize("case", ["context", "few-new-tokens"])
def test_prefill_of_awkward_sizes(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    without_compiler(monkeypatch)
    spec, sizes = ODD
    check_prefill(make_packed_impl(sizes, torch.float32, *random_layer(spec)), sizes, torch.float32, *PREFILLS[case])


def test_context_that_would_not_fit_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit, keys of earlier context are never made: rows are read to latents only."""
    if not cpu.has_extend_kernel(torch.bfloat16):
        pytest.skip("vLLM's kernel does not run on this processor")
    torch.manual_seed(0)
    monkeypatch.setattr(cpu, "MAX_EXPANDED_BYTES", 0)
    monkeypatch.setattr(PackedCPUMLAImpl, "_expand", None)
    impl = make_packed_impl(SIZES, torch.bfloat16, *random_layer(SPECS[4]))
    check_prefill(impl, SIZES, torch.bfloat16, [32, 8, 520, 1500], [200, 40, 1, 31])
