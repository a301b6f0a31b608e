"""Packed rows on a GPU: kernels against torch, and models in vLLM against transformers. Skipped without a GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.agreement import hf_logprobs
from support.commands import convert
from support.engine import run_engine
from support.files import TEXT
from support.models import RandomModel, load, save_random_mla
from support.packed import SPECS, pack_checkpoint, random_layer
from transformers import AutoTokenizer

from vllm_mla_plugin.backends.gpu_means import Means
from vllm_mla_plugin.backends.gpu_pack import pack
from vllm_mla_plugin.backends.gpu_rows import widen
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.latent_packing import dequantise, mean_at, quantise
from vllm_mla_plugin.testing.gpu import BLOCK, Case, Packing, impl_for
from vllm_mla_plugin.testing.layer import make_cache, reference

pytestmark = pytest.mark.gpu

LENGTHS = [1, 17, 64, 700, 4100]
LLAMA = ("512x4g64/64x8g64s", "512x8g64s/64x8g64s", "512x16/64x16", "448x4g64/64x8g64s", "960x4g64/64x8g64s")
ENGINE = {"dtype": "bfloat16", "max_model_len": 256, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}
PROMPTS = [[(7 * i + 3 * j) % 199 for j in range(n)] for i, n in enumerate((40, 1, 130, 77))]
TOLERANCE = 0.05
"""Of the mean difference of log-probabilities. Not measured on a GPU yet. Unpacked models differ by at most 0.015; a
number that 16-bit rounding moves to another code adds to it."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS + LLAMA)
def test_rows(spec: str, dtype: torch.dtype) -> None:
    """Packed as in torch: the same bytes, but where sums of squares differ in their last bits; read as in torch."""
    torch.manual_seed(0)
    format, mean, freqs = random_layer(spec)
    new = (torch.randn(2000, sum(format.sizes)) * torch.logspace(-2, 1.5, 2000)[:, None]).to("cuda", dtype)
    cache = torch.zeros(-(-2000 // BLOCK) + 1, BLOCK, format.bytes_per_token, dtype=torch.uint8, device="cuda")
    slots = torch.randperm(len(cache) * BLOCK, device="cuda")[:2000]
    slots[7] = -1
    pack(*new.split(list(format.sizes), dim=-1), cache, slots, format)
    written = slots >= 0
    rows = cache.flatten(0, 1)[slots[written]]
    assert (rows != quantise(new[written], format)).any(-1).float().mean() <= 2e-3
    assert (cache.flatten(0, 1) != 0).any(-1).sum() <= 1999
    positions = torch.arange(4000, device="cuda")[::2][written]
    means = None if mean is None else Means.of(mean.cuda(), freqs.cuda(), 4096, 32)
    got = widen(cache, slots[written], positions, format, means, torch.float32)
    expected = dequantise(rows, format)
    if mean is not None:
        expected += mean_at(mean.cuda(), freqs.cuda(), positions)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [1, 9, 32])
@pytest.mark.parametrize("spec", SPECS + LLAMA)
def test_decode(spec: str, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    format, mean, freqs = random_layer(spec)
    latent, rope = format.sizes
    case = Case(latent, rope, nope=64, v=64, heads=heads)
    backend = impl_for(case, dtype, "auto", Packing(format, mean, freqs, 8192))
    numbers, table = make_cache(case.sizes, LENGTHS, torch.float32)
    cache = quantise(numbers.nan_to_num(), format)
    cache[numbers.isnan().any(-1)] = 255
    q = torch.randn(len(LENGTHS), heads, latent + rope, dtype=dtype)
    got, _ = backend.decode(q.cuda(), cache.cuda(), table.cuda(), LENGTHS)
    for i, length in enumerate(LENGTHS):
        keys = dequantise(cache[table[i].long()].flatten(0, 1)[:length], format)
        if mean is not None:
            keys += mean_at(mean, freqs, torch.arange(length))
        keys = keys[:, None].expand(-1, heads, -1)
        expected = reference(q[i : i + 1], keys, keys[..., :latent], case.scale)
        error = ((got[i : i + 1].double().cpu() - expected).norm() / expected.norm()).item()
        assert error < 1e-2, f"length {length}: {error:.1e}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, all of its cache packed, with a format of its own for each layer. Its weights are so small that a
    rounding to another code changes little."""
    folder = tmp_path_factory.mktemp("packed")
    shape = {"heads": 6, "kv_heads": 3, "head_dim": 32, "hidden": 192, "layers": 3}
    source = RandomModel("llama", std=0.08, dtype=torch.bfloat16, **shape).save(folder / "source")
    out = convert(source, folder / "mla", "--method", "exact")
    formats = [CacheFormat.parse(spec) for spec in ("96x8g48s/96x6g32", "40x4g20+56x3g28c/96x8g32", "96x4g32/96x5g16")]
    ids = torch.randint(0, 199, (8, 32), generator=torch.Generator().manual_seed(0))
    return pack_checkpoint(out, folder / "out", formats, ids)


FEATURES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False},
    "full-cuda-graphs": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}},
    "chunked-prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 16},
    "n-gram-speculation": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    },
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(model: Path, feature: str) -> None:
    """Each way of serving gives the log-probabilities of transformers; memory pays for the bytes of rows."""
    engine = ENGINE | FEATURES[feature]
    result = run_engine(model, PROMPTS, max_tokens=24, prompt_logprobs=True, no_tokenizer=True, engine=engine)
    network = load(model)
    for i, prompt in enumerate(PROMPTS):
        expected = hf_logprobs(network, prompt + result["tokens"][i])
        got = result["prompt_logprobs"][i] + result["logprobs"][i]
        mean = sum(abs(a - b) for a, b in zip(got, expected, strict=True)) / len(got)
        assert mean < TOLERANCE, f"prompt {i}: {mean:.3f}"
    token = sum(network.config.cache_format(layer).bytes_per_token for layer in range(3))
    assert result["kv_tokens"] == pytest.approx(2**28 / token, rel=1e-2)
    if feature == "full-cuda-graphs":
        assert result["cuda_graphs"]["mode"] == "FULL_DECODE_ONLY" and result["cuda_graphs"]["captured"] > 0


def test_sizes_per_layer(tmp_path: Path) -> None:
    """Layers of different sizes, each with a format of its own, in full CUDA graphs."""
    specs = ("96x8g48/32x8g32", "48x8g24/16x6g16", "64x8g32/64x8g32", "96x8g48/32x8g32")
    formats = [CacheFormat.parse(spec) for spec in specs]
    latents, ropes = zip(*(format.sizes for format in formats), strict=True)
    fields = {"kv_lora_ranks": list(latents), "qk_rope_head_dims": list(ropes), "initializer_range": 0.08}
    plain = save_random_mla(tmp_path / "plain", torch.bfloat16, **fields)
    ids = torch.randint(0, 199, (8, 32), generator=torch.Generator().manual_seed(0))
    out = pack_checkpoint(plain, tmp_path / "out", formats, ids)
    engine = ENGINE | FEATURES["full-cuda-graphs"]
    result = run_engine(out, PROMPTS, max_tokens=24, prompt_logprobs=True, no_tokenizer=True, engine=engine)
    network = load(out)
    for i, prompt in enumerate(PROMPTS):
        expected = hf_logprobs(network, prompt + result["tokens"][i])
        got = result["prompt_logprobs"][i] + result["logprobs"][i]
        assert sum(abs(a - b) for a, b in zip(got, expected, strict=True)) / len(got) < TOLERANCE
    assert result["kv_tokens"] == pytest.approx(2**28 / sum(f.bytes_per_token for f in formats), rel=1e-2)


def test_prefix_caching(model: Path) -> None:
    """The second time, most of a prompt comes from the cache, and the answer is the same."""
    job = {"max_tokens": 8, "no_tokenizer": True, "engine": ENGINE | {"max_num_seqs": 1}}
    result = run_engine(model, [PROMPTS[2], PROMPTS[2]], **job)
    assert result["cached_tokens"][0] == 0 and result["cached_tokens"][1] >= 64
    assert result["tokens"][0] == result["tokens"][1]


def test_fp8_is_refused(model: Path) -> None:
    with pytest.raises(AssertionError, match=r"This checkpoint's cache is packed .* so it is not kept as fp8 too"):
        run_engine(model, PROMPTS, max_tokens=1, no_tokenizer=True, engine=ENGINE | {"kv_cache_dtype": "fp8"})


def test_real_model(exact: Path, tmp_path: Path) -> None:
    """SmolLM2, all of its cache in 4 bits: vLLM predicts a text as well as transformers does."""
    ids = AutoTokenizer.from_pretrained(exact)(TEXT, return_tensors="pt").input_ids[0, : 8 * 48].view(8, 48)
    out = pack_checkpoint(exact, tmp_path / "model", [CacheFormat.parse("192x4g32/192x4g32")], ids)
    prompts = [ids.flatten().tolist()[:200], ids.flatten().tolist()[100:]]
    engine = ENGINE | {"max_model_len": 512}
    result = run_engine(out, prompts, max_tokens=1, prompt_logprobs=True, engine=engine)
    network = load(out)
    for got, prompt in zip(result["prompt_logprobs"], prompts, strict=True):
        expected = hf_logprobs(network, prompt)
        assert sum(got) / len(got) == pytest.approx(sum(expected) / len(expected), abs=0.03)
