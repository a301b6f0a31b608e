"""Conversions whose layers and algebra run on the GPU. Skipped without a GPU."""

import json
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.commands import SPLIT, convert
from support.models import RandomModel

pytestmark = pytest.mark.gpu

METHODS = {
    "attention-aware": ("--refit-steps", 8),
    "closed-form": ("--refit-steps", 0),
    "transmla": ("--method", "transmla"),
    "mha2mla": ("--method", "mha2mla"),
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_same_quality_as_on_cpu(tmp_path: Path, options: tuple[object, ...]) -> None:
    """Rounding differs between the devices, so the errors of the layers may differ by 2%."""
    source = RandomModel(heads=8, kv_heads=4, head_dim=64, hidden=256, layers=4).save(tmp_path / "source")
    errors = {}
    for device in ("cpu", "cuda"):
        report = tmp_path / f"{device}.json"
        sampled = ("--calibration-tokens", 2048)
        convert(source, tmp_path / device, *options, *SPLIT, *sampled, "--device", device, "--json", report)
        errors[device] = sum(layer["output_error"] for layer in json.loads(report.read_text())["per_layer"])
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.02)
