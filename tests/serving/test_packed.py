"""Packed caches in the real vLLM engine, against transformers.

A number that differs in its last bit between two programs may be rounded to another code, which is a whole step away.
In a real model such steps grow from layer to layer, so only small random models agree to the last digits.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.agreement import assert_agrees, hf_logprobs
from support.commands import convert
from support.engine import run_engine, speculative
from support.files import TEXT
from support.models import RandomModel, load
from support.packed import pack_checkpoint
from transformers import AutoTokenizer

from vllm_mla_plugin import backends
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.packed_attention import served_format

FORMATS = [
    CacheFormat.parse(spec)
    for spec in ("96x8g48s/96x6g32", "40x4g20+56x3g28c/96x8g32", "96x4g32/48x5g16+48x16/nomean/a4")
]
PROMPTS = [list(range(5, 35)) * 5, [7], list(range(100, 117)), list(range(20, 60))]
JOB: dict[str, Any] = {"max_tokens": 12, "no_tokenizer": True}
ENGINE: dict[str, Any] = {"max_model_len": 256}
CAPACITY = 2**30  # bytes of the cache in these tests


def random_packed(folder: Path, family: str, formats: list[CacheFormat]) -> Path:
    # Weights so small that a rounding to another code changes little.
    model = RandomModel(family, heads=6, kv_heads=3, head_dim=32, hidden=192, layers=3, std=0.08)
    out = convert(model.save(folder / "source"), folder / "mla", "--method", "exact")
    ids = torch.randint(0, 199, (8, 32), generator=torch.Generator().manual_seed(0))
    return pack_checkpoint(out, folder / "packed", formats, ids)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with a format of its own for each layer."""
    return random_packed(tmp_path_factory.mktemp("tiny"), "llama", FORMATS)


@pytest.fixture(scope="module")
def plain(tiny: Path) -> dict[str, Any]:
    """What it answers, request by request."""
    return run_engine(tiny, PROMPTS, prompt_logprobs=True, engine=ENGINE, **JOB)


@pytest.fixture(scope="module")
def packed(exact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, all of its cache in 4 bits."""
    ids = AutoTokenizer.from_pretrained(exact)(TEXT, return_tensors="pt").input_ids[0, : 8 * 48].view(8, 48)
    format = CacheFormat.parse("192x4g32/192x4g32")
    return pack_checkpoint(exact, tmp_path_factory.mktemp("packed") / "model", [format], ids)


def test_equals_transformers(tiny: Path, plain: dict[str, Any]) -> None:
    """The engine computes what transformers simulates, and memory pays for the bytes of rows."""
    model = load(tiny)
    assert_agrees(plain, model, PROMPTS)
    unpacked = hf_logprobs(load(tiny.parent / "source"), PROMPTS[0])
    packed = plain["prompt_logprobs"][0]
    assert max(abs(a - b) for a, b in zip(packed, unpacked, strict=True)) > 0.05, "packing must be seen"
    token_bytes = sum(format.bytes_per_token for format in FORMATS)
    assert plain["kv_tokens"] == pytest.approx(CAPACITY / token_bytes, rel=1e-3)


def test_chunked_prefill_prefix_caching_and_preemption(tiny: Path, plain: dict[str, Any]) -> None:
    """Prompts in pieces, from the cache, and computed again after preemption: the same tokens."""
    engine = ENGINE | {
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 18,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
    }
    result = run_engine(tiny, [*PROMPTS, *PROMPTS], engine=engine, **JOB)
    assert result["tokens"] == plain["tokens"] * 2
    assert max(result["cached_tokens"]) >= 128


@speculative
def test_speculative_decoding(tiny: Path, plain: dict[str, Any]) -> None:
    """Several tokens of a request at once, guessed from its prompt: the same tokens."""
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    result = run_engine(tiny, PROMPTS, engine=ENGINE | {"speculative_config": speculation}, **JOB)
    assert result["tokens"] == plain["tokens"]


def test_tensor_parallel(tmp_path: Path) -> None:
    """Two ranks compute what transformers does; keys are normalised before they are packed."""
    out = random_packed(tmp_path, "qwen3", [CacheFormat.parse("96x4g32/96x5g48")])
    engine = ENGINE | {"tensor_parallel_size": 2}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    result = run_engine(out, PROMPTS, engine=engine, environment=environment, prompt_logprobs=True, **JOB)
    assert_agrees(result, load(out), PROMPTS)


def test_pipeline_parallel_compiled(tiny: Path, tmp_path: Path) -> None:
    """Two stages, and torch.compile, which is what `vllm serve` does without further flags."""
    engine = ENGINE | {"pipeline_parallel_size": 2, "enforce_eager": False}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CACHE_ROOT": str(tmp_path)}
    result = run_engine(tiny, PROMPTS, engine=engine, environment=environment, prompt_logprobs=True, **JOB)
    assert_agrees(result, load(tiny), PROMPTS)


def test_unpacked(tiny: Path) -> None:
    """`--hf-overrides` serves the same checkpoint with the numbers that the model computes."""
    engine = ENGINE | {"hf_overrides": {"latent_cache": None}}
    result = run_engine(tiny, PROMPTS, engine=engine, prompt_logprobs=True, **JOB)
    assert_agrees(result, load(tiny.parent / "source"), PROMPTS)


def test_cache_dtype(tiny: Path) -> None:
    """The model's own dtype, asked for, means unpacked; another is refused in one sentence."""
    engine = ENGINE | {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}
    assert run_engine(tiny, PROMPTS, engine=engine, **JOB)["kv_tokens"] == pytest.approx(CAPACITY / (3 * 384), rel=1e-3)
    with pytest.raises(AssertionError, match=r"This checkpoint's cache is packed .* so it is not kept as fp8 too"):
        run_engine(tiny, PROMPTS, engine=ENGINE | {"kv_cache_dtype": "fp8"}, **JOB)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not serve packed rows says so, and how to go on."""
    monkeypatch.setattr(
        backends, "current_platform", SimpleNamespace(is_cpu=lambda: False, is_cuda_alike=lambda: False)
    )
    with pytest.raises(ValueError, match=r"Only CPUs, and GPUs .* serve .*mla_96x4g32_48x5g16.* --hf-overrides"):
        backends.select_backend(96, 96, FORMATS[2])
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(cache_format=FORMATS.__getitem__), dtype=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(decode_context_parallel_size=2),
    )
    with pytest.raises(ValueError, match="Decode context parallelism does not take a packed cache yet"):
        served_format(config, 0)


def test_real_model(packed: Path) -> None:
    """A repeated prompt comes from the cache and is answered as the first time; transformers predicts as well."""
    ids = AutoTokenizer.from_pretrained(packed)(TEXT).input_ids
    prompts = [ids[:200], ids[100:370], ids[:200], ids[100:370]]
    result = run_engine(packed, prompts, max_tokens=24, engine={"max_num_seqs": 1})
    assert result["cached_tokens"][2:] == [192, 256]
    assert result["tokens"][2:] == result["tokens"][:2]
    scored = run_engine(packed, prompts[:2], max_tokens=1, prompt_logprobs=True)
    model = load(packed)
    for got, prompt in zip(scored["prompt_logprobs"], prompts, strict=False):
        expected = hf_logprobs(model, prompt)
        assert sum(got) / len(got) == pytest.approx(sum(expected) / len(expected), abs=0.02)
