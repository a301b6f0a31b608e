"""xFormers' attention on the GPU gives what torch's gives, without padding. Skipped without a GPU or xformers."""

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("xformers")

from support.commands import UNPACKED, convert
from support.files import CALIBRATION
from support.models import RandomModel, load

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("masked", [False, True])
def test_same_predictions_and_gradients(masked: bool, tmp_path: Path) -> None:
    source = RandomModel(head_dim=32, hidden=128).save(tmp_path / "source")
    model = convert(source, tmp_path / "mla", "--calibration", CALIBRATION, "--refit-steps", 0, *UNPACKED)
    ids = torch.arange(2 * 50, device="cuda").view(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0  # padding on the left
    outputs = []
    for name in ("sdpa", "xformers"):
        loaded = load(model, torch.bfloat16, attn_implementation=name).cuda()
        logits = loaded(ids, attention_mask=mask if masked else None).logits.float()[:, 8:]
        logits.log_softmax(-1)[..., 5].mean().backward()
        outputs.append((logits, loaded.model.layers[0].self_attn.kv_b_proj.weight.grad.float()))
    for found, expected in zip(*outputs, strict=True):
        assert (found - expected).norm() < 0.03 * expected.norm()
