"""Converted models that were quantised afterwards, and conversions of quantised sources, on a CPU."""

from pathlib import Path

import pytest
import torch
from support.agreement import hf_logprobs
from support.commands import UNPACKED, convert
from support.engine import run_engine
from support.models import RandomModel, load
from support.quantised import quantise
from support.quantised_sources import quantise_source

pytestmark = pytest.mark.engine

MAX_LOGPROB_ERROR = 0.1  # vLLM rounds activations too
PROMPTS = [list(range(5, 45)), [7], list(range(100, 117))]
INPUT = ("q_proj", "kv_a_proj_with_mqa")
CASES = {
    "everything": ("llama", (), False),
    "everything-qk-norm": ("qwen3", (), False),
    "all-but-kv_b_proj": ("llama", ("kv_b_proj",), False),
    "all-but-one-input": ("llama", INPUT[:1], False),
    "all-but-the-input": ("llama", INPUT, True),
}


@pytest.mark.parametrize("case", CASES)
def test_quantised_afterwards(case: str, tmp_path: Path) -> None:
    """Prompts and decoded tokens agree with transformers, whose weights are the same numbers unquantised.

    The projections of the input stay one product where none of them is quantised.
    """
    family, ignore, one_product = CASES[case]
    source = RandomModel(family, heads=6, kv_heads=3, head_dim=32, hidden=96, std=0.1).save(tmp_path / "source")
    mla = convert(source, tmp_path / "mla", "--calibration-tokens", 1024, *UNPACKED)
    quantised, plain = quantise(mla, tmp_path, ignore)
    job = {"max_tokens": 16, "prompt_logprobs": True, "no_tokenizer": True, "engine": {"max_model_len": 256}}
    result, model = run_engine(quantised, PROMPTS, modules=True, **job), load(plain)
    assert ("model.layers.0.self_attn.query_latent_proj" in result["modules"]) == one_product
    for i, prompt in enumerate(PROMPTS):
        expected = hf_logprobs(model, prompt + result["tokens"][i])
        got = result["prompt_logprobs"][i] + result["logprobs"][i]
        assert got == pytest.approx(expected, abs=MAX_LOGPROB_ERROR)


def test_static_scale_of_kv_b_proj_is_refused(tmp_path: Path) -> None:
    """Its weights cannot be read back through activations that a fixed scale rounds."""
    source = RandomModel(heads=6, kv_heads=3, hidden=96).save(tmp_path / "source")
    mla = convert(source, tmp_path / "mla", "--method", "exact")
    quantised, _ = quantise(mla, tmp_path, static=True)
    with pytest.raises(AssertionError, match="kv_b_proj is quantised with a fixed scale of its activations"):
        run_engine(quantised, PROMPTS, no_tokenizer=True, engine={"max_model_len": 256})


MAX_SOURCE_ERROR = 0.05
# vLLM's kernels for weights of 4 bits on CPUs want inputs and outputs that are multiples of 32. vLLM refuses GPTQ with
# act-order, and serves FP8 on GPUs alone.
SOURCES = {"w4a16": torch.bfloat16, "gptq": torch.float16, "awq": torch.float16}


@pytest.mark.parametrize("name", SOURCES)
def test_quantised_source(name: str, tmp_path: Path) -> None:
    """Prompts and decoded tokens agree with transformers, whose weights are the dequantised ones."""
    dtype = SOURCES[name]
    model = RandomModel(heads=6, kv_heads=3, head_dim=32, hidden=96, intermediate=64, std=0.05)
    quantised, plain = quantise_source(model.save(tmp_path / "source"), name, tmp_path, dtype)
    out, twin = (convert(folder, tmp_path / f"{folder.name}-mla", "--method", "exact") for folder in (quantised, plain))
    engine = {"max_model_len": 256, "dtype": str(dtype).removeprefix("torch.")}
    job = {"max_tokens": 16, "prompt_logprobs": True, "no_tokenizer": True, "modules": True, "engine": engine}
    result, reference = run_engine(out, PROMPTS, **job), load(twin)
    assert "model.layers.0.self_attn.query_latent_proj" in result["modules"], "one product, as it is not quantised"
    for i, prompt in enumerate(PROMPTS):
        expected = hf_logprobs(reference, prompt + result["tokens"][i])
        got = result["prompt_logprobs"][i] + result["logprobs"][i]
        assert got == pytest.approx(expected, abs=MAX_SOURCE_ERROR)
