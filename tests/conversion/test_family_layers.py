"""Every family's layers, run one at a time as calibration runs them."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.commands import UNPACKED, convert
from support.files import CALIBRATION
from support.models import FAMILY_MODELS, load

from mla_converters.checkpoints.source import open_source
from mla_converters.streaming import layers
from vllm_mla_plugin.checkpoint.families import FAMILIES


def test_every_family_has_a_model() -> None:
    assert list(FAMILY_MODELS) == [family.model_type for family in FAMILIES.values()]


@pytest.mark.parametrize("family", FAMILY_MODELS)
@torch.inference_mode()
def test_equals_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits agree, with norms, multipliers, experts and RoPE as transformers has them."""
    monkeypatch.setattr(layers, "calibration_autocast", lambda device: nullcontext())  # which rounds to bfloat16
    folder = FAMILY_MODELS[family].save(tmp_path / "source")
    windows = torch.randint(0, 199, (2, 70), generator=torch.Generator().manual_seed(1))
    with open_source(str(folder)) as source:
        hidden = layers.embed(source, windows)
        for layer in layers.source_layers(source, "cpu"):
            layer.advance(hidden, layer.attend)
        (got,) = layers.logits(source, [hidden], "cpu")
    expected = load(folder)(windows).logits
    assert (got - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize("family", ["granite", "olmo2", "phi3", "glm4", "minimax_m2"])
def test_truncated(family: str, tmp_path: Path) -> None:
    """At half of the cache, the default method errs less than half as much as no attention would, in each layer."""
    source = FAMILY_MODELS[family].save(tmp_path / "source")
    text = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 2)
    out = convert(source, tmp_path / "mla", *text, *UNPACKED)
    model = load(out)
    assert [layer["output_error"] < 0.5 for layer in model.config.mla_conversion["per_layer"]] == [True] * 2
    with torch.inference_mode():
        assert model(torch.arange(60)[None]).logits.isfinite().all()
