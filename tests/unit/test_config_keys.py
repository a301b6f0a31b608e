"""Every key of a ``config.json`` is known, without effect, refused by name, or listed."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import Refused, convert
from support.models import RandomModel
from transformers import CONFIG_MAPPING

from mla_converters.checkpoints.config_keys import (
    PATTERNS_WITHOUT_EFFECT,
    UNDERSTOOD,
    WITHOUT_EFFECT,
    account_for_keys,
    is_neutral,
)
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import FAMILIES

LLAMA = CONFIG_MAPPING["llama"]
EXACT = ("--method", "exact")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.model_type)
def test_own_keys_are_known(family: Any) -> None:
    """What transformers writes for a family is understood, in full and as files have it."""
    config = CONFIG_MAPPING[family.model_type]()
    for written in (config.to_dict(), config.to_diff_dict()):
        assert account_for_keys(written, type(config)) == ([], [])


CHANGING: dict[str, Any] = {
    "rope_ratio": 2.0,
    "rope_interleaved": True,
    "rope_scaling_enabled": True,
    "use_rotary_offset": True,
    "alibi_slopes": [1.0],
    "sliding_window_pattern": 4,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
    "embedding_scale": 0.0,
    "attn_logit_softcap": 30.0,
    "final_logit_softcapping": 30.0,
    "use_qk_norm": True,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": 4,
    "attention_sinks": 4,
    "router_bias": True,
    "use_gate": "sigmoid",
    "causal_mask": "prefix",
    "use_parallel_residual": True,
}


@pytest.mark.parametrize("name", CHANGING)
def test_changing_keys_are_refused(name: str) -> None:
    with pytest.raises(ConversionError) as raised:
        account_for_keys({name: CHANGING[name]}, LLAMA)
    assert f"config.json has {name} {CHANGING[name]!r}, which" in str(raised.value)
    assert str(raised.value).count(". ") == 0  # one sentence


NEUTRAL = {
    "rope_interleaved": False,
    "rope_ratio": 1.0,
    "use_mrope": False,
    "sliding_window_pattern": None,
    "embedding_multiplier": 1,
    "attention_chunk_size": 0,
    "attention_sinks": [],
    "attn_logit_softcapping": 0.0,
    "rope_notes": "",
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_pass(name: str) -> None:
    assert account_for_keys({name: NEUTRAL[name]}, LLAMA) == ([], [])


def test_neutral() -> None:
    """1 leaves a product as it is, and 0 or nothing a switch; true is on, whatever it is called."""
    assert is_neutral("logit_scale", 1.0) and not is_neutral("logit_scale", 0.0)
    assert is_neutral("softcap", 0) and not is_neutral("softcap", 1)
    assert not is_neutral("use_scaling", True) and is_neutral("use_scaling", False)


def test_others_are_listed() -> None:
    """Names that say nothing are listed, and names without effect are not."""
    written = {"zeta": 1, "alpha": {"a": 1}, "_name_or_path": "x", "unsloth_fixed": True, "torch_dtype": "float16"}
    written |= {"mask_token_id": 3, "attn_pdrop": 0.1, "auto_map": {}, "use_cache": True, "temperature": 0.6}
    assert account_for_keys(written, LLAMA) == (["alpha", "zeta"], [])


def test_every_exception_has_its_reason() -> None:
    for reasons in (UNDERSTOOD, WITHOUT_EFFECT, PATTERNS_WITHOUT_EFFECT):
        assert reasons and all(len(reason) > 10 for reason in reasons.values())


@pytest.mark.parametrize("outer", ["rope_scaling", "rope_parameters"])
def test_rope_parameters(outer: str) -> None:
    """Those that transformers does not read are refused, because it would compute without them."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert account_for_keys({outer: rope | {"finetuned": True}}, LLAMA) == ([], [])
    with pytest.raises(ConversionError, match=rf"{outer}\.extrapolation_factor 2\.0"):
        account_for_keys({outer: rope | {"extrapolation_factor": 2.0}}, LLAMA)


def edited(folder: Path, **changes: Any) -> Path:
    """A random model whose ``config.json`` has more keys."""
    path = RandomModel("qwen2").save(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_convert_and_plan_refuse(refusal: Refused, tmp_path: Path) -> None:
    source = edited(tmp_path / "source", embedding_multiplier=12.0)
    assert "has embedding_multiplier 12.0" in refusal("convert", source, tmp_path / "out", *EXACT)
    assert "has embedding_multiplier 12.0" in refusal("plan", source)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_report_card_and_table(command_line: Any, tmp_path: Path) -> None:
    source = edited(tmp_path / "source", new_idea=3, another_idea="x")
    out = tmp_path / "out"
    code, table, _ = command_line("convert", source, out, *EXACT)
    assert code == 0
    assert json.loads((out / "conversion_report.json").read_text())["unknown_keys"] == ["another_idea", "new_idea"]
    assert "`another_idea`, `new_idea`" in (out / "README.md").read_text()
    assert "Keys not understood" in table
    plain = convert(edited(tmp_path / "plain"), tmp_path / "out2", *EXACT)
    assert "keys that vllm-mla-plugin does not know" not in (plain / "README.md").read_text()


def test_dual_chunk_attention_is_left_out(tmp_path: Path) -> None:
    settings = {"chunk_size": 128, "local_size": 16, "original_max_position_embeddings": 128}
    source = edited(tmp_path / "source", dual_chunk_attention_config=settings)
    out = convert(source, tmp_path / "out", *EXACT)
    assert "dual_chunk_attention_config" not in json.loads((out / "config.json").read_text())
    warning = json.loads((out / "conversion_report.json").read_text())["warnings"][0]
    assert "has dual_chunk_attention_config" in warning and "within 128 tokens only" in warning
    with open_source(str(source)) as opened:
        assert opened.warnings == [warning]
