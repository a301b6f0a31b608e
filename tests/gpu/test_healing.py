"""Healing on the GPU. Skipped without a GPU."""

import json
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.commands import SPLIT, convert, heal
from support.files import CALIBRATION
from support.models import RandomModel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_same_quality_as_on_cpu(tmp_path: Path, family: str) -> None:
    """Training in bfloat16 on the GPU rounds differently, but must lower the divergence as much as on the CPU."""
    source = RandomModel(family=family, heads=8, kv_heads=4, head_dim=64, hidden=256).save(tmp_path / "source")
    model = convert(source, tmp_path / "mla", "--method", "attention-aware", "--refit-steps", 0, *SPLIT)
    options = ("--text", CALIBRATION, "--tokens", 8192, "--length", 256, "--steps", 24)
    after = {}
    for device in ("cpu", "cuda"):
        healed = heal(model, tmp_path / device, *options, "--device", device)
        kl = json.loads((healed / "conversion_report.json").read_text())["healing"]["kl_held_out"]
        assert kl["after"] < kl["before"]
        after[device] = kl["after"]
    assert after["cuda"] == pytest.approx(after["cpu"], rel=0.05)
