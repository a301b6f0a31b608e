"""Weights that a running engine loads again, as trainers make it do with every new state of a model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.agreement import assert_agrees
from support.commands import convert
from support.engine import run_engine
from support.models import RandomModel, load
from support.packed import pack_checkpoint

from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat

pytestmark = pytest.mark.engine
PROMPTS = [list(range(5, 45)), [7], list(range(100, 117))]
JOB: dict[str, Any] = {
    "max_tokens": 12,
    "prompt_logprobs": True,
    "no_tokenizer": True,
    "engine": {"max_model_len": 256},
}


def conversion(folder: Path, std: float = 0.1, theta: float = 10000.0, kv_heads: int = 3, packed: bool = False) -> Path:
    """An exact conversion of a random model; what is packed has means."""
    rope = {"rope_type": "default", "rope_theta": theta}
    model = RandomModel(heads=6, kv_heads=kv_heads, head_dim=32, hidden=192, std=std, rope=rope)
    exact = convert(model.save(folder / "source"), folder / "mla", "--method", "exact")
    if not packed:
        return exact
    ids = torch.randint(0, 199, (8, 32), generator=torch.Generator().manual_seed(0))
    return pack_checkpoint(exact, folder / "packed", [CacheFormat.parse("96x8g48/96x8g48")], ids)


@pytest.mark.parametrize("kind", [{"kv_heads": 3}, {"kv_heads": 1}, {"packed": True}], ids=str)
def test_other_weights(kind: dict[str, Any], tmp_path: Path) -> None:
    """The engine then computes what transformers does with the other model."""
    served, other = (conversion(tmp_path / str(std), std, **kind) for std in (0.1, 0.08))
    assert load(served).config.rotary_query_map == (kind.get("kv_heads") != 1)
    assert_agrees(run_engine(served, PROMPTS, reload=str(other), **JOB), load(other), PROMPTS)


def test_other_frequencies_are_refused(tmp_path: Path) -> None:
    """vLLM puts the table back that was there at the start, so answers would be wrong."""
    served, other = (conversion(tmp_path / str(theta), theta=theta) for theta in (10000.0, 50000.0))
    with pytest.raises(AssertionError, match="other RoPE frequencies than those that are served"):
        run_engine(served, PROMPTS, reload=str(other), **JOB)
