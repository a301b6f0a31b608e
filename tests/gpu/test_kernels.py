"""Decode and prefill backends on a GPU against attention in float64. Skipped without one; not run yet."""

from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from gpu_backends import Case, impl_for, make_prefill
from test_backend_cpu import cached_tokens, make_cache, reference
from vllm.platforms import current_platform

CASES = {
    # vLLM's own choices, untouched
    "deepseek": Case(512, 64, nope=128, v=128),
    "small": Case(256, 64, nope=128, v=128),
    # ours
    "half-llama-3-8b": Case(960, 64, nope=128, v=128),
    "half-smollm2": Case(128, 64, nope=64, v=64, heads=9),
    "no-power-of-2": Case(300, 48, nope=80, v=80, heads=7),
    "576-split-otherwise": Case(256, 320, nope=64, v=64),
    "narrow-rope": Case(120, 8, nope=128, v=128),
    "one-head": Case(128, 64, nope=128, v=128, heads=1),
}
LENGTHS = [1, 17, 64, 700, 4100]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fp8", [False, True], ids=["16-bit cache", "fp8 cache"])
@pytest.mark.parametrize("name", CASES)
def test_decode(name: str, fp8: bool, dtype: torch.dtype) -> None:
    case = CASES[name]
    if fp8 and not current_platform.has_device_capability(89):
        pytest.skip("fp8 needs compute capability 8.9")
    torch.manual_seed(0)
    backend = impl_for(case, dtype, "fp8" if fp8 else "auto")
    cache, table = make_cache(case.sizes, LENGTHS, dtype)
    cache.nan_to_num_()
    if fp8:
        cache = cache.to(torch.float8_e4m3fn)
    q = torch.randn(len(LENGTHS), case.heads, case.latent + case.rope, dtype=dtype)
    got, _ = backend.decode(q.cuda(), cache.cuda(), table.cuda(), LENGTHS)
    for i, length in enumerate(LENGTHS):
        keys = cached_tokens(cache.to(dtype), table[i], length)[:, None].expand(-1, case.heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., : case.latent], case.scale)
        error = (got[i : i + 1].double().cpu() - expected).abs().max() / expected.abs().max()
        assert error < 2e-2, f"{backend.name}, length {length}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_prefill(name: str, dtype: torch.dtype) -> None:
    """New tokens of several requests, causally; and a chunk of earlier context, with its log-sum-exp."""
    case = CASES[name]
    torch.manual_seed(0)
    lengths = [1, 130, 77]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    backend = make_prefill(case, dtype)
    q = torch.randn(sum(lengths), case.heads, case.nope + case.rope, dtype=dtype)
    k = torch.randn_like(q)
    v = torch.randn(sum(lengths), case.heads, case.v, dtype=dtype)
    backend.prepare_metadata(SimpleNamespace(query_start_loc=starts.cuda(), max_query_len=max(lengths)))
    got, _ = backend.run_prefill_new_tokens(q=q.cuda(), k=k.cuda(), v=v.cuda(), return_softmax_lse=True)
    chunk = SimpleNamespace(
        query_start_loc=starts.cuda(),
        cu_seq_lens=starts.cuda(),
        max_query_len=max(lengths),
        max_seq_len=max(lengths),
    )
    whole, lse = backend.run_prefill_context_chunk(chunk=chunk, q=q.cuda(), k=k.cuda(), v=v.cuda())
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        part = slice(begin, end)
        expected = reference(q[part], k[part], v[part], case.scale)
        assert (got[part, :, : case.v].double().cpu() - expected).abs().max() < 2e-2
        scores = torch.einsum("qhd,khd->hqk", q[part].double(), k[part].double()) * case.scale
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[part].double())
        assert (whole[part, :, : case.v].double().cpu() - expected).abs().max() < 2e-2
        assert (lse[:, part].double().cpu() - scores.logsumexp(-1)).abs().max() < 2e-2
