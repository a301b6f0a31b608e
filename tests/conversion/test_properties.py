"""Properties that hold for any shape and any budget. ``PROPERTY_EXAMPLES`` sets the number of examples."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.agreement import assert_agrees
from support.engine import run_engine
from support.files import CALIBRATION
from support.models import QWEN3_EXPERTS, RandomModel, load

from mla_converters.convert import convert
from mla_converters.options import (
    AttentionAwareOptions,
    ConvertOptions,
    ExactOptions,
    MethodOptions,
    TransmlaOptions,
)

EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "24"))
SETTINGS: dict[str, Any] = {
    "deadline": None,
    "derandomize": "PROPERTY_EXAMPLES" not in os.environ,
    "suppress_health_check": list(HealthCheck),
}
TEXT: dict[str, Any] = {"calibration": (str(CALIBRATION),), "calibration_tokens": 2048}
ROPES = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
)


@st.composite
def random_models(draw: st.DrawFn) -> RandomModel:
    """A model of any family, with any shape that the family allows."""
    family = draw(st.sampled_from(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")))
    kv_heads, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    experts = {"qwen3_moe": QWEN3_EXPERTS, "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2}}
    return RandomModel(
        family,
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(2, 24)),
        hidden=32 * kv_heads * groups,
        layers=draw(st.integers(1, 3)),
        bias=family in ("llama", "qwen3") and draw(st.booleans()),
        tied=draw(st.booleans()),
        rope=draw(st.sampled_from(ROPES)),
        experts=experts.get(family, {}),
    )


@settings(max_examples=EXAMPLES, **SETTINGS)
@given(
    model=random_models(),
    method=st.sampled_from((ExactOptions(), TransmlaOptions(freqfold=1), AttentionAwareOptions(refit_steps=0))),
)
def test_nothing_truncated_nothing_changed(model: RandomModel, method: MethodOptions) -> None:
    """If the cache has room for everything, every method gives the source's logits."""
    width = model.kv_heads * model.head_dim
    whole = {"kv_lora_rank": width, "qk_rope_head_dim": width} | TEXT
    options = ConvertOptions(method=method, **({} if isinstance(method, ExactOptions) else whole))
    with tempfile.TemporaryDirectory() as folder:
        source, out = model.save(Path(folder, "source")), Path(folder, "mla")
        convert(str(source), out, options, quiet=True)
        ids = torch.randint(0, 199, (2, 60), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected, got = (load(path)(ids).logits for path in (source, out))
    assert (got - expected).norm() / expected.norm() < 1e-4


@pytest.mark.engine
@settings(max_examples=max(2, EXAMPLES // 12), **SETTINGS)
@given(model=random_models(), data=st.data())
def test_vllm_equals_transformers(model: RandomModel, data: st.DataObject) -> None:
    """At any budget, vLLM gives the same log-probabilities as transformers."""
    width = model.kv_heads * model.head_dim
    rope = 2 * data.draw(st.integers(1, width // 2), label="qk_rope_head_dim / 2")
    rank = data.draw(st.integers(1, 2 * width - rope), label="kv_lora_rank")
    options = ConvertOptions(
        method=AttentionAwareOptions(refit_steps=0),
        kv_lora_rank=rank,
        qk_rope_head_dim=rope,
        **TEXT,
    )
    prompts = [list(range(5, 45)), [7], list(range(100, 117))]
    with tempfile.TemporaryDirectory() as folder:
        source, out = model.save(Path(folder, "source")), Path(folder, "mla")
        convert(str(source), out, options, quiet=True)
        job = {"max_tokens": 8, "prompt_logprobs": True, "no_tokenizer": True, "engine": {"max_model_len": 128}}
        assert_agrees(run_engine(out, prompts, **job), load(out), prompts)
