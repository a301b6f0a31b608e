"""Calibration text that the model writes itself, alone and together with a file."""

from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from support.files import CALIBRATION
from support.models import RandomModel
from transformers import AutoModelForCausalLM

from mla_converters.checkpoints.source import open_source
from mla_converters.text import sampling
from mla_converters.text.calibration import calibration_texts, random_tokens
from mla_converters.text.healing import training_windows
from mla_converters.text.sampling import drawn, sampled_texts

LENGTH = 20


@pytest.mark.parametrize("random", [RandomModel("llama"), RandomModel("qwen3"), RandomModel("mistral", window=8)])
def test_texts_are_drawn_from_what_the_model_predicts(
    random: RandomModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing from predictions without a cache, with the same random numbers, gives the same text in each batch."""
    monkeypatch.setattr(sampling, "TOKENS", 3 * LENGTH)
    monkeypatch.setattr(sampling, "sampling_dtype", lambda device: torch.float32)
    folder = random.save(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    never = torch.tensor([5, 7])
    first = torch.arange(10, 15)
    with open_source(str(folder)) as source, Progress(disable=True) as progress:
        texts = sampled_texts(source, first, never, LENGTH, torch.Generator().manual_seed(1), progress, "cpu")
    assert texts.shape == (5, LENGTH)
    assert torch.equal(texts[:, 0], first)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        for batch in texts.split(3):
            for token in range(1, LENGTH):
                logits = model(batch[:, :token]).logits[:, -1].index_fill(1, never, float("-inf"))
                expected = drawn(logits.softmax(-1).double().cumsum(-1), generator)
                assert torch.equal(expected[:, 0], batch[:, token]), token


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    """Each token's share is within 4 standard deviations. Impossible tokens, even first and last, never occur."""
    likely = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.29, 0.01, 0.0])
    texts = 100_000
    ids = drawn(likely.double().cumsum(-1).expand(texts, -1).contiguous(), torch.Generator().manual_seed(0))
    assert ids.shape == (texts, 1)
    shares = ids[:, 0].bincount(minlength=len(likely)) / texts
    assert ((shares - likely).abs() <= 4 * (likely * (1 - likely) / texts).sqrt()).all()


def test_a_window_holds_several_texts(tmp_path: Path) -> None:
    """A random token begins each text. The same seed gives the same windows; another seed gives others."""
    folder = RandomModel().save(tmp_path / "source")
    with open_source(str(folder)) as source, Progress(disable=True) as progress:
        source.config.max_position_embeddings = 1200
        texts = [calibration_texts(source, ("self",), 2400, seed, progress, 2048) for seed in (0, 0, 1)]
        windows = [each["used"] for each in texts]
        first = random_tokens(source, (1, 6), torch.Generator().manual_seed(0))
    assert windows[0].shape == (2, 1200)
    assert torch.equal(windows[0][:, [0, 600]].flatten(), first[0, :4])
    assert torch.equal(texts[0]["held_out"][:, 0].sort().values, first[0, 4:].sort().values)
    assert texts[0]["held_out"].shape == (2, 512)
    assert torch.equal(windows[0], windows[1])
    assert not torch.equal(windows[0], windows[2])


def test_healing_takes_more_texts_that_are_shorter(tmp_path: Path) -> None:
    """A new text begins with a random token after every 256 tokens of a window."""
    folder = RandomModel().save(tmp_path / "source")
    with open_source(str(folder)) as source, Progress(disable=True) as progress:
        source.config.max_position_embeddings = 512
        windows = training_windows(source, ("self",), 1024, 512, 0, progress)
        first = random_tokens(source, (1, 4), torch.Generator().manual_seed(0))
    assert sorted(windows[:, [0, 256]].tolist()) == sorted(first.view(2, 2).tolist())


def test_what_is_held_out_stands_for_all_texts(tmp_path: Path) -> None:
    """Every prefix of the windows has each text's share, to within one. No window is lost or occurs twice."""
    folder = RandomModel().save(tmp_path / "source")
    short = tmp_path / "short.txt"
    with open_source(str(folder)) as source, Progress(disable=True) as progress:
        short.write_text(CALIBRATION.read_text()[:2000])
        ids = source.tokenizer(short.read_text()).input_ids
        pieces = [ids[start : start + 256] for start in range(0, len(ids) - 255, 256)]
        windows = training_windows(source, ("self", str(short)), 30 * 256, 256, 0, progress).tolist()
    assert 1 < len(pieces) < 15
    assert len(windows) == 15 + len(pieces)
    assert sorted(window for window in windows if window in pieces) == sorted(pieces)
    for first in range(1, len(windows) + 1):
        of_file = sum(window in pieces for window in windows[:first])
        assert abs(of_file - first * len(pieces) / len(windows)) <= 1, first


def test_texts_share_the_windows(tmp_path: Path) -> None:
    """Texts take turns, so that the first windows have some of each. Each text has the windows that it has alone."""
    folder = RandomModel().save(tmp_path / "source")
    origins = ("self", str(CALIBRATION))
    with open_source(str(folder)) as source, Progress(disable=True) as progress:
        both = calibration_texts(source, origins, 2100, 0, progress)["used"]
        alone = calibration_texts(source, origins[:1], 1050, 0, progress)["used"]
        text = source.tokenizer(CALIBRATION.read_text()).input_ids
    assert both.shape == (4, 512)
    assert torch.equal(both[::2], alone)
    for window in both[1::2].tolist():
        assert any(text[start : start + 512] == window for start in range(len(text)))


def test_a_short_text_makes_all_windows_short(tmp_path: Path) -> None:
    folder = RandomModel().save(tmp_path / "source")
    short = tmp_path / "short.txt"
    short.write_text(CALIBRATION.read_text()[:1000])
    with open_source(str(folder)) as source, Progress(disable=True) as progress:
        source.config.max_position_embeddings = 2048
        assert 512 < len(source.tokenizer(short.read_text()).input_ids) <= 1024
        windows = calibration_texts(source, (str(short), str(CALIBRATION)), 4096, 0, progress, 1024)["used"]
    assert windows.shape == (8, 512)
