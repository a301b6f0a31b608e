"""Every family's layers, run one at a time as calibration runs them."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import UNPACKED, convert
from support.files import CALIBRATION
from support.models import FAMILY_MODELS, load
from transformers import MiniMaxM2Config

from mla_converters.checkpoints.config_keys import account_for_keys
from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError
from mla_converters.streaming import layers
from vllm_mla_plugin.checkpoint.families import FAMILIES


def test_every_family_has_a_model() -> None:
    assert list(FAMILY_MODELS) == [family.model_type for family in FAMILIES.values()]


@pytest.mark.parametrize("family", FAMILY_MODELS)
@torch.inference_mode()
def test_equals_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits agree, with norms, multipliers, experts and RoPE as transformers has them."""
    monkeypatch.setattr(layers, "calibration_autocast", lambda device: nullcontext())  # which rounds to bfloat16
    monkeypatch.setattr(layers, "native_bfloat16", lambda device: False)
    folder = FAMILY_MODELS[family].save(tmp_path / "source")
    windows = torch.randint(0, 199, (2, 70), generator=torch.Generator().manual_seed(1))
    with open_source(str(folder)) as source:
        hidden = layers.embed(source, windows)
        for layer in layers.source_layers(source, "cpu"):
            layer.advance(hidden, layer.attend)
        (got,) = layers.logits(source, [hidden], "cpu")
    expected = load(folder)(windows).logits
    assert (got - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("family", ["granite", "olmo2", "phi3", "glm4", "minimax_m2", "smollm3"])
def test_truncated(family: str, tmp_path: Path) -> None:
    """At half of the cache, the default method errs less than half as much as no attention would, in each layer."""
    source = FAMILY_MODELS[family].save(tmp_path / "source")
    text = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 2)
    out = convert(source, tmp_path / "mla", *text, *UNPACKED)
    model = load(out)
    assert [layer["output_error"] < 0.5 for layer in model.config.mla_conversion["per_layer"]] == [True] * len(
        model.model.layers
    )
    with torch.inference_mode():
        assert model(torch.arange(60)[None]).logits.isfinite().all()


def test_layers_of_a_second_token_are_left_out(tmp_path: Path) -> None:
    """Their tensors are no part of the model, and OUT's configuration has none of them."""
    model = FAMILY_MODELS["glm4_moe"]
    source = replace(model, experts=model.experts | {"num_nextn_predict_layers": 1}).save(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(4, 8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    out = convert(source, tmp_path / "mla", "--method", "exact")
    assert not any(".layers.3." in name for name in load_file(out / "model.safetensors"))
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0


MINIMAX = {"rotary_dim": 64, "use_qk_norm": True, "attn_type_list": [1, 1], "scoring_func": "sigmoid"}


def test_keys_that_only_vllm_reads() -> None:
    """MiniMax-M2's keys are understood with the values that transformers assumes, and else refused."""
    assert account_for_keys(MINIMAX, MiniMaxM2Config) == ([], [])
    for change in ({"use_qk_norm": False}, {"scoring_func": "softmax"}, {"attn_type_list": [1, 0]}):
        with pytest.raises(ConversionError, match="by its name changes what the model computes"):
            account_for_keys(MINIMAX | change, MiniMaxM2Config)
