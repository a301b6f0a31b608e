"""Decode and prefill backends on a GPU, compared with attention in float64. Skipped without a GPU."""

import math
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from vllm.platforms import current_platform
from vllm.triton_utils import triton
from vllm.utils.math_utils import cdiv

from vllm_mla_plugin.backends import select_backend
from vllm_mla_plugin.backends.gpu_absorb import absorb
from vllm_mla_plugin.backends.gpu_merge import Parts
from vllm_mla_plugin.checkpoint.layouts import (
    A100,
    BLACKWELL,
    HOPPER,
    OTHER_GPU,
    PLUGIN_BACKEND,
    SHARED_BYTES,
    gpu_backends,
)
from vllm_mla_plugin.testing.gpu import Case, configured, impl_for, make_prefill
from vllm_mla_plugin.testing.layer import absorbed, absorption, cached_tokens, make_cache, reference

pytestmark = pytest.mark.gpu

CASES = {
    # vLLM's own backends serve these.
    "deepseek": Case(512, 64, nope=128, v=128),
    "small": Case(256, 64, nope=128, v=128),
    # This plugin's backend serves these.
    "half-llama-3-8b": Case(960, 64, nope=128, v=128),
    "half-smollm2": Case(128, 64, nope=64, v=64, heads=9),
    "160-numbers": Case(128, 32, nope=64, v=64, heads=9),
    "no-power-of-2": Case(300, 48, nope=80, v=80, heads=7),
    "no-multiple-of-8": Case(300, 48, nope=100, v=100),
    "576-split-otherwise": Case(384, 192, nope=64, v=64),
    "288-split-otherwise": Case(128, 160, nope=64, v=64),
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
    q = backend.as_read(torch.randn(len(LENGTHS), case.heads, case.latent + case.rope, dtype=dtype), cache)
    got, _ = backend.decode(q.cuda(), cache.cuda(), table.cuda(), LENGTHS)
    tolerance = 1e-1 if q.dtype == torch.float8_e4m3fn else 1e-2  # such kernels also round probabilities to fp8
    for i, length in enumerate(LENGTHS):
        keys = cached_tokens(cache.to(dtype), table[i], length)[:, None].expand(-1, case.heads, -1)
        expected = reference(q[i : i + 1].to(dtype), keys, keys[..., : case.latent], case.scale)
        error = relative_error(got[i : i + 1], expected)
        assert error < tolerance, f"{backend.name}, length {length}: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_absorb(name: str, dtype: torch.dtype) -> None:
    """Queries are absorbed and rotated in one launch, for single requests and for many."""
    case = CASES[name]
    torch.manual_seed(0)
    for rows in (1, 20, 300):
        q, weight, positions, turns = absorption(case.heads, case.nope, case.latent, case.rope, rows, dtype)
        turns = turns.to(dtype)
        got = absorb(q.cuda(), weight.cuda(), positions.cuda(), turns.cuda())
        error = relative_error(got, absorbed(q, weight, positions, turns))
        assert error < 1e-2, f"{rows} rows: {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 37])
@pytest.mark.parametrize("name", CASES)
def test_values_in_the_merge(name: str, rows: int, dtype: torch.dtype) -> None:
    """Parts of contexts are merged and multiplied by W_UV as in float64, with the means of packed rows too."""
    case = CASES[name]
    torch.manual_seed(0)
    count, tile = 9, 32
    lengths = torch.randint(1, 3000, (rows,))
    lengths[1:2] = 0  # such a row only fills up a CUDA graph
    results = torch.randn(rows, case.heads, count, case.latent + 2)
    shares = torch.randn(2, case.latent + case.rope)
    kv_b_proj = torch.randn(case.heads, case.nope + case.v, case.latent, dtype=dtype) / case.latent**0.5
    weight = kv_b_proj.cuda()[:, case.nope :].transpose(1, 2)
    out = torch.empty(rows, case.heads * case.v, dtype=dtype, device="cuda")
    parts = Parts(results.cuda(), lengths.int().cuda(), case.latent, dtype, tile, 1, shares.cuda())
    parts.project(weight, out)
    for row, length in enumerate(lengths.tolist()):
        each = max(1, cdiv(cdiv(length, count), tile)) * tile
        used = results[row, :, : cdiv(length, each)].double()
        expected = torch.zeros(case.heads, case.latent, dtype=torch.float64)
        if length:
            lse = used[..., case.latent] * math.log(2)
            expected = torch.einsum("hp,hpl->hl", lse.softmax(-1), used[..., : case.latent])
            first = (used[:, 0, case.latent + 1] * math.log(2) - lse.logsumexp(-1)).exp()
            expected += shares[0, : case.latent] + first[:, None] * shares[1, : case.latent]
        product = torch.einsum("hl,hlv->hv", expected, weight.double().cpu()).flatten()
        assert (out[row].double().cpu() - product).norm() <= 1e-2 * product.norm() + 1e-6


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """``|got - expected| / |expected|``, where ``expected`` is float64 on the CPU."""
    return ((got.double().cpu() - expected).norm() / expected.norm()).item()


def test_choices() -> None:
    """vLLM's own backends are chosen if they serve the size. If no backend does, the refusal says so."""
    half, small = CASES["half-smollm2"], CASES["small"]

    def chosen(case: Case, cache_dtype: str = "auto") -> str | None:
        with configured(case, torch.bfloat16, cache_dtype):
            backend = select_backend(case.latent, case.rope)
        return None if backend is None else backend.__name__

    assert chosen(CASES["deepseek"]) is chosen(CASES["deepseek"], "fp8") is chosen(small) is None
    assert chosen(small, "fp8") == chosen(half) == chosen(half, "fp8") == "AnySizeTritonMLABackend"
    with pytest.raises(ValueError, match="give another --kv-cache-dtype"):
        chosen(half, "fp8_e5m2")
    with pytest.raises(ValueError, match="smaller --kv-lora-rank"):
        chosen(Case(4032, 64, nope=128, v=128))
    with configured(CASES["deepseek"], torch.bfloat16) as vllm_config:
        vllm_config.model_config.hf_text_config.num_hidden_layers = 2
        vllm_config.model_config.hf_text_config.kv_lora_ranks = [512, 256]
        backend = select_backend(512, 64)
    assert backend is not None and backend.__name__ == "AnySizeTritonMLABackend", "layers differ in size"


def test_plan_knows_this_gpu() -> None:
    """The plan has this GPU's shared memory, and names the backend that a layer of each size gets here."""
    capability = torch.cuda.get_device_capability()
    gpu = A100 if capability == (8, 0) else {9: HOPPER, 10: BLACKWELL}.get(capability[0], OTHER_GPU)
    properties = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    assert properties["max_shared_mem"] == SHARED_BYTES[gpu]
    for case in CASES.values():
        planned = gpu_backends((case.latent, case.rope), case.v, "bfloat16", gpu)
        with configured(case, torch.bfloat16):
            backend = select_backend(case.latent, case.rope)
        assert planned and (planned == [PLUGIN_BACKEND]) == (backend is not None), case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_prefill(name: str, dtype: torch.dtype) -> None:
    """Causal attention to new tokens of several requests, and attention to earlier context with its log-sum-exp."""
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
        assert relative_error(got[part, :, : case.v], expected) < 1e-2
        scores = torch.einsum("qhd,khd->hqk", q[part].double(), k[part].double()) * case.scale
        expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[part].double())
        assert relative_error(whole[part, :, : case.v], expected) < 1e-2
        assert (lse[:, part].double().cpu() - scores.logsumexp(-1)).abs().max() < 2e-2
