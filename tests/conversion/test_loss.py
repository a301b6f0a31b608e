"""What a conversion says of its own loss: measured on text held out, in the report, the table and the card."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from support.commands import CommandLine, convert
from support.files import CALIBRATION
from support.models import RandomModel
from transformers import AutoModelForCausalLM

from mla_converters.cards.card import read_report
from mla_converters.checkpoints.source import open_source
from mla_converters.reports.verdicts import VERDICTS, verdict
from mla_converters.streaming.loss import measured_loss
from mla_converters.text.calibration import calibration_texts
from mla_converters.text.held_out import GRAM

HALF = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0, "--cache-ratio", 0.5)
UNPACKED = ("--latent-bits", 16)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel(std=0.3).save(tmp_path_factory.mktemp("loss") / "source")


@pytest.fixture(scope="module")
def mla(source: Path) -> Path:
    return convert(source, source.with_name("mla"), *HALF, *UNPACKED)


def test_numbers_are_transformers(source: Path, mla: Path) -> None:
    """Layer by layer, chunk by chunk, the numbers are those of both models as transformers loads them."""
    windows = torch.randint(199, (3, 150), generator=torch.Generator().manual_seed(0))
    with open_source(str(source)) as opened, Progress(disable=True) as progress:
        found = measured_loss(opened, mla, windows, "cpu", progress)
    models = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, mla))
    with torch.no_grad():
        theirs, own = (model(windows).logits.log_softmax(-1) for model in models)
    losses = [-each[:, :-1].gather(-1, windows[:, 1:, None]).mean().item() for each in (theirs, own)]
    assert found is not None and found.kl > 0.01
    assert found.model_dump() == dict(
        tokens=450,
        source_perplexity=pytest.approx(math.exp(losses[0]), rel=1e-4),
        perplexity=pytest.approx(math.exp(losses[1]), rel=1e-4),
        kl=pytest.approx((theirs.exp() * (theirs - own)).sum(-1).mean().item(), abs=1e-4),
        top1_agreement=pytest.approx((theirs.argmax(-1) == own.argmax(-1)).double().mean().item(), abs=1e-4),
    )


def test_text_is_held_out(source: Path, tmp_path: Path) -> None:
    """No run of tokens was used. A text that was used whole gives nothing, nor does one that repeats itself."""
    short = tmp_path / "short.txt"
    short.write_text(CALIBRATION.read_text()[:4000])
    repeated = tmp_path / "repeated.txt"
    repeated.write_text(short.read_text()[:600] * 40)
    with open_source(str(source)) as opened, Progress(disable=True) as progress:

        def held_out(text: Path, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
            found = calibration_texts(opened, [str(text)], tokens, 0, progress, 256)
            return found["used"], found["held_out"]

        used, found = held_out(CALIBRATION, 1024)
        assert len(found) == 2

        def runs(windows: torch.Tensor) -> set[tuple[int, ...]]:
            return {tuple(run) for window in windows for run in window.unfold(0, GRAM, 1).tolist()}

        assert runs(found) and not runs(found) & runs(used)
        assert len(held_out(short, 65536)[1]) == 0 and len(held_out(repeated, 1024)[1]) == 0


def test_report_table_and_card(command_line: CommandLine, source: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "report.json"
    code, table, _ = command_line("convert", source, out, *HALF, *UNPACKED, "--json", file)
    assert code == 0
    report = read_report(out)
    assert json.loads(file.read_text())["loss"]["kl"] == report.loss.kl > 0
    found = verdict(report)
    words = " ".join(table.replace("│", " ").split())
    assert found is not None and found.words in words
    assert (f"vllm-mla heal {out} {out}-healed --text" in words.replace("\n", " ")) == found.heals
    card = (out / "README.md").read_text()
    assert found.words in card and f"{report.loss.kl:.4f} nats" in card


def test_verdicts(mla: Path) -> None:
    """The worse the divergence, the worse the words; an exact conversion needs none; without text, the proof counts."""
    report = read_report(mla)

    def words(kl: float) -> str:
        return verdict(report.model_copy(update={"loss": report.loss.model_copy(update={"kl": kl})})).words

    assert [words(each.below) for each in VERDICTS] == [each.words for each in VERDICTS]
    assert words(VERDICTS[0].below + 0.001) == VERDICTS[1].words
    assert verdict(report.model_copy(update={"lossless": True})) is None
    assert report.self_check.text
    check = report.self_check.model_copy(update={"kl": 0.0})
    assert verdict(report.model_copy(update={"loss": None, "self_check": check})) == VERDICTS[0]
    check = check.model_copy(update={"text": False})
    assert verdict(report.model_copy(update={"loss": None, "self_check": check})) is None
