"""What `heal` says when the text held out does not show that training helped, and how much text that is."""

import json
from pathlib import Path

import pytest
import torch
from support.commands import UNPACKED, CommandLine, convert
from support.files import CALIBRATION
from support.models import RandomModel

from mla_converters.heal import run as healing
from mla_converters.text.healing import hold_out

NOT_BETTER = "Training did not make the model better on text held out (1.0000 to {:.4f} nats per token)"
WORSE = "Training made the model worse on text held out (1.0000 to {:.4f} nats per token)"


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = RandomModel().save(tmp_path_factory.mktemp("source") / "model")
    few = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0)
    return convert(source, source.with_name("mla"), *few, *UNPACKED)


@pytest.mark.parametrize(
    ("loss", "after", "said"),
    [
        ("kl", 0.99, None),
        ("kl", 1.04, NOT_BETTER),
        ("kl", 1.06, WORSE),
        ("kl", float("nan"), WORSE),
        ("lm", 0.99, None),
        ("lm", 1.01, WORSE),
    ],
)
def test_change_on_text_held_out(
    mla: Path,
    tmp_path: Path,
    command_line: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    loss: str,
    after: float,
    said: str | None,
) -> None:
    """A model that is no better is written with a warning, and one that is worse by more than chance is not.

    Chance is a share of the divergence, and a loss on text has none of it.
    """
    losses = iter((1.0, after))
    parts = {"kl": lambda value: (value, value, 0.0), "lm": lambda value: (value, 0.0, value)}[loss]
    monkeypatch.setattr(
        healing, "held_out_loss", lambda *arguments: torch.tensor(parts(next(losses)), dtype=torch.float64)
    )
    out = tmp_path / "healed"
    options = ("--text", CALIBRATION, "--tokens", 1024, "--length", 64, "--steps", 1, "--loss", loss)
    code, shown, errors = command_line("heal", mla, out, *options)
    expected = "" if said is None else said.format(after)
    if said == WORSE:
        assert code == 2 and expected in errors and not list(tmp_path.iterdir())
        return
    assert code == 0
    warning = json.loads((out / "conversion_report.json").read_text())["healing"].get("warning")
    assert (warning is not None) == (said is not None)
    for told in (warning or "", shown, (out / "README.md").read_text()):
        assert expected in " ".join(told.split())


@pytest.mark.parametrize(
    ("windows", "held_out"), [(2, 1), (15, 1), (16, 2), (24, 3), (64, 4), (128, 4), (129, 5), (9999, 128)]
)
def test_windows_held_out(windows: int, held_out: int) -> None:
    """One in 32, but of few windows more, because a single window tells too little."""
    trained, kept = hold_out(torch.arange(windows))
    assert len(kept) == held_out
    assert torch.equal(torch.cat((kept, trained)), torch.arange(windows))
