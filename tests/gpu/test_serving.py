"""Converted models in vLLM on a GPU, with each feature once. Skipped without a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.commands import SPLIT, convert
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import RandomModel, load, save_random_mla
from support.quantised_sources import quantise_source

pytestmark = pytest.mark.gpu

# FlashAttention has kernels for these head sizes. The weights do not enlarge activations from layer to layer, because
# 16-bit rounding errors would then grow too, in the source as in the conversion.
SHAPE = {"heads": 8, "hidden": 256, "std": 256**-0.5, "dtype": torch.bfloat16}
MODEL = RandomModel(kv_heads=4, head_dim=64, layers=4, **SHAPE)
CALIBRATED = ("--method", "transmla", "--calibration", CALIBRATION, "--calibration-tokens", 1024)
# Tolerances for the mean difference of log-probabilities. Measured differences:
# - 0.006: unconverted sources in bfloat16. 0.012: an fp8 cache on an H200; transformers rounds its cache too.
# - 0.016: the same, with prompts in chunks.
# - 0.02: queries that are 5% too long in all layers. 0.14: RoPE frequencies at half of their values.
ROUNDING, CHUNK_ROUNDING = 0.015, 0.03
# The cache has a fixed size, because otherwise engines of tests that run side by side would count each other's memory
# as their own.
ENGINE = {"dtype": "bfloat16", "max_model_len": 256, "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**28}
PROMPTS = [[(7 * i + 3 * j) % 199 for j in range(n)] for i, n in enumerate((40, 1, 130, 77))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with 192 cached numbers per token and layer, which this plugin's backend serves."""
    folder = tmp_path_factory.mktemp("gpu")
    return convert(MODEL.save(folder / "source"), folder / "mla", *CALIBRATED, *SPLIT)


def run(model: Path, prompts: list[list[int]] = PROMPTS, **engine: Any) -> dict[str, Any]:
    arguments = ENGINE | engine
    return run_engine(model, prompts, max_tokens=24, prompt_logprobs=True, no_tokenizer=True, engine=arguments)


class RoundedCache(DynamicCache):
    """A cache that rounds like an fp8 cache (e4m3, scale 1). As in vLLM, a prompt reads its own tokens unrounded."""

    def update(self, latent: torch.Tensor, k_rope: torch.Tensor, layer: int) -> tuple[torch.Tensor, ...]:
        new = (latent, k_rope)
        whole = super().update(*(x.to(torch.float8_e4m3fn).to(x.dtype) for x in new), layer)
        if (tokens := latent.shape[-2]) == 1:
            return whole
        return tuple(torch.cat((old[..., :-tokens, :], x), dim=-2) for old, x in zip(whole, new, strict=True))


@torch.inference_mode()
def differences(model: Path, result: dict[str, Any], cache: type[DynamicCache] = DynamicCache) -> list[float]:
    """Mean difference of log-probabilities from transformers, for each prompt with its answer."""
    network = load(model)
    means = []
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt + result["tokens"][i]])
        cached = cache()
        steps = [ids[:, : len(prompt)], *ids[:, len(prompt) : -1].split(1, dim=1)]
        logits = torch.cat([network(step, past_key_values=cached).logits[0] for step in steps]).log_softmax(-1)
        expected = logits.gather(1, ids[0, 1:, None])[:, 0]
        got = torch.tensor(result["prompt_logprobs"][i] + result["logprobs"][i])
        means.append((got - expected).abs().mean().item())
    return means


def assert_close_to_transformers(
    model: Path, result: dict[str, Any], tolerance: float = ROUNDING, cache: type[DynamicCache] = DynamicCache
) -> None:
    assert max(differences(model, result, cache)) < tolerance


FEATURES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False},
    "chunked-prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 16},
    "n-gram-speculation": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    },
    "fp8-cache": {"kv_cache_dtype": "fp8"},
    "fp8-cache-chunked": {"kv_cache_dtype": "fp8", "max_num_batched_tokens": 64, "max_num_seqs": 16},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_feature(model: Path, feature: str) -> None:
    """Each way of serving gives the log-probabilities of transformers."""
    fp8, chunked = (word in feature for word in ("fp8", "chunked"))
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    cache = RoundedCache if fp8 else DynamicCache
    # A chunk of a prompt reads earlier chunks rounded, but the test does not know where vLLM cuts chunks.
    tolerance = CHUNK_ROUNDING if fp8 and chunked else ROUNDING
    assert_close_to_transformers(model, run(model, **FEATURES[feature]), tolerance, cache)


@pytest.mark.parametrize("feature", ["compiled", "chunked-prefill", "full-cuda-graphs"])
def test_sizes_per_layer(tmp_path: Path, feature: str) -> None:
    """Layers of different sizes, some of them vLLM's own and two of equal width; memory pays for each layer's width."""
    graphs = {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}}
    latents, ropes = [512, 256, 384, 512], [64, 64, 192, 64]
    shape = {"hidden_size": 256, "head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
    fields = shape | {"initializer_range": SHAPE["std"], "kv_lora_ranks": latents, "qk_rope_head_dims": ropes}
    folder = save_random_mla(tmp_path / "model", torch.bfloat16, **fields)
    result = run(folder, **FEATURES.get(feature, graphs))
    assert_close_to_transformers(folder, result)
    assert result["kv_tokens"] == pytest.approx(2**28 / (2 * (sum(latents) + sum(ropes))), rel=1e-2)


@pytest.mark.parametrize("rope", [64, 32])
def test_full_cuda_graphs(tmp_path: Path, rope: int) -> None:
    """Decoding with 192 or 160 numbers per token and layer runs as one graph per batch size. vLLM compiles with
    ``fullgraph``, so a graph break in the model's code is an error."""
    split = ("--kv-lora-rank", 128, "--qk-rope-head-dim", rope)
    out = convert(MODEL.save(tmp_path / "source"), tmp_path / "mla", *CALIBRATED, *split)
    result = run(out, enforce_eager=False, compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"})
    assert result["cuda_graphs"]["mode"] == "FULL_DECODE_ONLY", result["cuda_graphs"]
    assert result["cuda_graphs"]["captured"] > 0
    assert_close_to_transformers(out, result)


def test_prefix_caching(model: Path) -> None:
    """The second time, most of a prompt comes from the cache, and the answer is the same."""
    job = {"max_tokens": 8, "no_tokenizer": True, "engine": ENGINE | {"max_num_seqs": 1}}
    result = run_engine(model, [PROMPTS[2], PROMPTS[2]], **job)
    assert result["cached_tokens"][0] == 0 and result["cached_tokens"][1] >= 64
    assert result["tokens"][0] == result["tokens"][1]


# No GPU has run this yet. vLLM also rounds activations to FP8, whose rounding of 3% a number this bound allows.
FP8_ROUNDING = 0.1


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-block-128", "fp8-channel"])
def test_fp8_source(name: str, tmp_path: Path) -> None:
    """A source in FP8 keeps its quantised MLPs. The log-probabilities are those of the dequantised weights."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    quantised, plain = quantise_source(replace(MODEL, intermediate=384).save(tmp_path / "source"), name, tmp_path)
    out, twin = (convert(folder, tmp_path / f"{folder.name}-mla", *CALIBRATED, *SPLIT) for folder in (quantised, plain))
    assert_close_to_transformers(twin, run(out), FP8_ROUNDING)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensor_parallel(model: Path) -> None:
    assert_close_to_transformers(model, run(model, tensor_parallel_size=2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("feature", ["compiled", "chunked-prefill", "fp8-cache-chunked"])
def test_decode_context_parallel(model: Path, feature: str) -> None:
    """Two GPUs share out each context, in decoding and where prompts come in chunks, and hold twice as many tokens."""
    fp8 = "fp8" in feature
    if fp8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 needs compute capability 8.9")
    result = run(model, tensor_parallel_size=2, decode_context_parallel_size=2, **FEATURES[feature])
    cache, tolerance = (RoundedCache, CHUNK_ROUNDING) if fp8 else (DynamicCache, ROUNDING)
    assert_close_to_transformers(model, result, tolerance, cache)


def test_deepseek_sizes_are_vllms(tmp_path: Path) -> None:
    """A model with 512 + 64 runs with vLLM's own backends."""
    source = RandomModel(kv_heads=4, head_dim=128, **SHAPE).save(tmp_path / "source")
    split = ("--kv-lora-rank", 512, "--qk-rope-head-dim", 64)
    out = convert(source, tmp_path / "mla", *CALIBRATED, *split)
    assert_close_to_transformers(out, run(out))


def test_float32_is_refused(model: Path) -> None:
    with pytest.raises(AssertionError, match="give --dtype bfloat16"):
        run(model, dtype="float32")
