"""Converted models in the real vLLM engine, compared with transformers and with their source."""

import math
from pathlib import Path

import pytest
import torch
from support.agreement import assert_agrees, hf_logprobs, text_prompts
from support.commands import UNPACKED, convert
from support.engine import run_engine
from support.files import CALIBRATION, TEXT
from support.models import LLAMA3, MIXTRAL_EXPERTS, QWEN3_EXPERTS, YARN, RandomModel, load
from transformers import AutoTokenizer

pytestmark = pytest.mark.engine


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def test_exact_equals_source_in_vllm(smollm2: Path, exact: Path) -> None:
    """Greedy tokens (16 prompts x 64), perplexity (4 digits) and capacity are those of the source."""
    ids = AutoTokenizer.from_pretrained(smollm2)(TEXT).input_ids
    job = {"max_tokens": 64, "prompt_logprobs": True}
    prompts = [*text_prompts(smollm2, 16), ids]
    source, mla = (run_engine(folder, prompts, **job) for folder in (smollm2, exact))
    assert mla["tokens"][:16] == source["tokens"][:16]
    source_ppl, mla_ppl = (perplexity(result["prompt_logprobs"][16]) for result in (source, mla))
    assert f"{mla_ppl:.4g}" == f"{source_ppl:.4g}"
    assert mla["kv_tokens"] == source["kv_tokens"]


@pytest.mark.parametrize("kind", ["half", "healed"])
def test_half_equals_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    """Prompts of different lengths agree in prefill and decode. The capacity is twice the source's."""
    model = request.getfixturevalue(kind)
    prompts = text_prompts(model, 12, longest=300)
    result = run_engine(model, prompts, max_tokens=24, prompt_logprobs=True)
    assert_agrees(result, load(model), prompts)
    assert result["kv_tokens"] == pytest.approx(2 * 23296, rel=0.01)


def test_compiled_equals_eager(half: Path, tmp_path: Path) -> None:
    """A compiled model agrees with transformers. `vllm serve` uses torch.compile unless a flag forbids it."""
    prompts = text_prompts(half, 4)
    environment = {"VLLM_CACHE_ROOT": str(tmp_path)}
    job = {"max_tokens": 16, "prompt_logprobs": True, "engine": {"enforce_eager": False}}
    result = run_engine(half, prompts, environment=environment, **job)
    assert_agrees(result, load(half), prompts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(half: Path, dtype: str) -> None:
    """The perplexity of a text with 16-bit serving stays close to that with float32."""
    ids = AutoTokenizer.from_pretrained(half)(TEXT).input_ids
    result = run_engine(half, [ids], prompt_logprobs=True, engine={"dtype": dtype})
    expected = perplexity(hf_logprobs(load(half), ids))
    assert perplexity(result["prompt_logprobs"][0]) == pytest.approx(expected, rel=0.02)


SHAPES = {
    "gqa": (RandomModel(), 48),
    "mha-head-48-bias": (RandomModel(heads=2, kv_heads=2, head_dim=48, hidden=64, bias=True), 100),
    "mqa-head-80-tied": (RandomModel(heads=4, kv_heads=1, head_dim=80, hidden=64, tied=True), 60),
    "mistral": (RandomModel("mistral", heads=9, kv_heads=3, hidden=144), 50),
    "qwen2": (RandomModel("qwen2", heads=3, kv_heads=3, head_dim=48, hidden=144, tied=True), 50),
    "nine-heads": (RandomModel(heads=9, kv_heads=3, head_dim=16, hidden=144), 40),
    "llama3-beyond-original-context": (RandomModel(rope=LLAMA3), 200),
    "linear": (RandomModel("qwen3", rope={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}), 50),
    "yarn-beyond-original-context": (RandomModel("qwen2", rope=YARN), 200),
    "qwen3": (RandomModel("qwen3", heads=9, kv_heads=3, head_dim=48, bias=True), 40),
    "qwen3-mqa-head-80-tied": (RandomModel("qwen3", kv_heads=1, head_dim=80, tied=True), 50),
    "qwen3-moe": (RandomModel("qwen3_moe", head_dim=32, layers=3, experts=QWEN3_EXPERTS), 50),
    "mixtral": (RandomModel("mixtral", heads=9, kv_heads=3, hidden=96, experts=MIXTRAL_EXPERTS), 50),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_random_shapes(shape: str, tmp_path: Path) -> None:
    """Exact conversions of awkward shapes give the source's tokens and transformers' log-probabilities."""
    variant, length = SHAPES[shape]
    source = variant.save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 199, (n,), generator=generator).tolist() for n in (length, 1, 17, 2)]
    job = {"max_tokens": 16, "prompt_logprobs": True, "no_tokenizer": True, "engine": {"max_model_len": 256}}
    mla, reference = run_engine(out, prompts, **job), load(source)
    assert_agrees(mla, load(out), prompts)
    assert_agrees(mla, reference, prompts)
    for prompt, tokens in zip(prompts, mla["tokens"], strict=True):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": len(tokens), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert tokens == expected[0, len(prompt) :].tolist()


def test_another_rope_is_refused(tmp_path: Path) -> None:
    """An override of the RoPE would have no effect. One sentence says so, before vLLM starts other processes."""
    mla = convert(RandomModel("qwen3").save(tmp_path / "source"), tmp_path / "mla", "--method", "exact")
    engine = {"hf_overrides": {"rope_parameters": YARN}, "max_model_len": 256}
    refusal = r"converted with the RoPE parameters .*'rope_type': 'default'.*, and rope_type cannot be changed"
    with pytest.raises(AssertionError, match=refusal) as error:
        run_engine(mla, [[1, 2, 3]], no_tokenizer=True, engine=engine)
    assert "pydantic" in str(error.value), "refused with the arguments"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_tensor_parallel(family: str, tmp_path: Path) -> None:
    """Two ranks agree with one, although they cannot share three KV heads evenly."""
    experts = QWEN3_EXPERTS | {"moe_intermediate_size": 64} if family == "qwen3_moe" else {}
    model = RandomModel(family, heads=6, kv_heads=3, head_dim=32, hidden=192, bias=True, experts=experts)
    source = model.save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    prompts = [list(range(5, 45)), [7], list(range(100, 117))]
    job = {"max_tokens": 12, "prompt_logprobs": True, "no_tokenizer": True}
    engine = {"max_model_len": 256, "tensor_parallel_size": 2}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    result = run_engine(out, prompts, engine=engine, environment=environment, **job)
    assert_agrees(result, load(source), prompts)


def test_pipeline_parallel(tmp_path: Path) -> None:
    """Two stages agree with one. (With ``enforce_eager``, vLLM 0.32 fails on CPU for its own models too.)"""
    source = RandomModel(heads=6, kv_heads=3, head_dim=32, hidden=192, layers=3).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    prompts = [list(range(5, 45)), [7], list(range(100, 117))]
    engine = {"max_model_len": 256, "pipeline_parallel_size": 2, "enforce_eager": False}
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CACHE_ROOT": str(tmp_path)}
    job = {"max_tokens": 12, "prompt_logprobs": True, "no_tokenizer": True}
    assert_agrees(run_engine(out, prompts, engine=engine, environment=environment, **job), load(source), prompts)


def test_dummy_weights(half: Path) -> None:
    """`--load-format dummy` works, so that a shape can be measured without weights."""
    result = run_engine(half, [[1, 2, 3]], max_tokens=4, engine={"load_format": "dummy"})
    assert len(result["tokens"][0]) == 4


def test_preemption_changes_nothing(half: Path) -> None:
    """If the cache is too small for all requests, vLLM preempts some, and the tokens stay the same."""
    prompts = text_prompts(half, 6, longest=200)
    alone = run_engine(half, prompts, max_tokens=48)
    crowded = run_engine(half, prompts, max_tokens=48, engine={"num_gpu_blocks_override": 40, "max_model_len": 512})
    assert crowded["tokens"] == alone["tokens"]


def test_calibrated_on_its_own_text_and_on_more(tmp_path: Path) -> None:
    """The default text is sampled from the model, so it needs no data set; more text can be added."""
    source = RandomModel(heads=6, kv_heads=3, hidden=96).save(tmp_path / "source")
    for options in ((), ("--calibration", CALIBRATION, "--calibration", "self")):
        out = convert(source, tmp_path / "mla", *options, "--calibration-tokens", 1024, *UNPACKED, "--force")
        model = load(out)
        assert model.config.mla_conversion["calibration"]["tokens"] == 1024
        prompts = [list(range(60, 90))]
        job = {
            "max_tokens": 8,
            "prompt_logprobs": True,
            "no_tokenizer": True,
            "engine": {"max_model_len": 256},
        }
        assert_agrees(run_engine(out, prompts, **job), model, prompts)
