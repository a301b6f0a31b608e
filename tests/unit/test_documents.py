"""Documents to train on: rows of JSON lines and Parquet files, packed, shuffled and mixed by weight."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.files import CALIBRATION
from support.models import RandomModel
from transformers import PreTrainedTokenizerFast

from mla_converters.checkpoints.source import open_source
from mla_converters.errors import ConversionError, OptionError
from mla_converters.options.text import parse_weighted
from mla_converters.support.progress import progress_bars
from mla_converters.text.calibration import calibration_texts
from mla_converters.text.documents import Documents
from mla_converters.text.healing import hold_out, training_windows

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
END = 7  # the id of the end of text
CONVERSATION = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel().save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """One id per character."""
    made = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), eos_token=chr(END))
    made.chat_template = TEMPLATE
    return made


def lines(path: Path, *rows: object) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


def read(documents: Documents, count: int, length: int, seed: int = 0) -> torch.Tensor:
    with progress_bars(quiet=True) as progress:
        return documents.windows(count, length, seed, progress)


def said(windows: torch.Tensor) -> list[str]:
    """The documents in windows."""
    return "".join(map(chr, windows.flatten().tolist())).split(chr(END))


def test_rows_of_every_kind(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = lines(tmp_path / "a.jsonl", {"text": "abc", "n": 1}, {"messages": CONVERSATION}, {"text": "de", "n": "x"})
    windows = read(Documents(rows, tokenizer, 199), 100, 1)
    assert windows.dtype == torch.int32
    assert Counter(said(windows)) == Counter(["abc", "[user]hi[assistant]you", "de", ""])


def test_parquet(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"messages": [CONVERSATION] * 3}).to_parquet(path)
    assert said(read(Documents(str(path), tokenizer, 199), 100, 1)) == ["[user]hi[assistant]you"] * 3 + [""]


def test_order_and_size(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Documents are shuffled by the seed, cut where there are enough, and a remainder is left out."""
    rows = lines(tmp_path / "a.jsonl", *({"text": f"{number:03d}"} for number in range(600)))
    once, again, other = (read(Documents(rows, tokenizer, 199), 50, 16, seed) for seed in (0, 0, 1))
    assert once.shape == (50, 16)
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert len(set(said(once))) == 200 + 1  # and what follows the last one
    assert read(Documents(rows, tokenizer, 199), 1000, 16).shape == (150, 16)
    assert read(Documents(rows, tokenizer, 199), 1000, 7).shape == (2400 // 7, 7)


def test_mixture(source: Path, tmp_path: Path) -> None:
    """Tokens are shared by weight, and every part of the windows has them in the same proportion."""
    ones, twos = (lines(tmp_path / f"{x}.jsonl", *[{"text": x * 99}] * 99) for x in "12")
    origins = (f"{ones}:0.75", f"{twos}:.25")
    with open_source(str(source)) as opened, progress_bars(quiet=True) as progress:
        windows = training_windows(opened, origins, 6400, 64, 0, progress)
        plain = training_windows(opened, (ones, str(CALIBRATION)), 6400, 64, 0, progress)
        for part in (windows, windows[:20]):
            assert Counter(map(chr, part[:, 0].tolist())) == {"1": 0.75 * len(part), "2": 0.25 * len(part)}
        assert (plain[:, 0] == ord("1")).sum() == len(plain) // 2 == 50
        with pytest.raises(ConversionError, match="--tokens is 128, but must be at least 256"):
            training_windows(opened, origins, 128, 64, 0, progress)


def test_few_windows_are_held_out() -> None:
    trained, held_out = hold_out(torch.arange(32 * 1000)[:, None])
    assert (len(trained), len(held_out)) == (32 * 1000 - 128, 128)


def test_weights() -> None:
    assert parse_weighted("a.jsonl") == ("a.jsonl", 1)
    assert parse_weighted("hub:a/b:c:train:0.5") == ("hub:a/b:c:train", 0.5)
    with pytest.raises(OptionError, match="whose weight is zero"):
        parse_weighted("self:0")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"body": "x"}', "has a row with neither text nor messages"),
        ("[1]", "has a row with neither text nor messages"),
        ('{"text": 1}', "has a row with neither text nor messages"),
        ('{"text": "x"', "Line 1 of text .* is not JSON"),
        ('{"messages": 3}', "chat template cannot lay out the messages"),
        ('{"text": "é"}', "beyond the model's vocabulary"),
        ("\udcff", "cannot be read"),
    ],
)
def test_refused_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConversionError, match=reason):
        Documents(str(path), tokenizer, 128)


@pytest.mark.parametrize("origin", ["nowhere.jsonl", "nowhere.parquet", "hub:nowhere/at-all"])
def test_refused_origins(tokenizer: PreTrainedTokenizerFast, origin: str) -> None:
    with pytest.raises(ConversionError, match=f"Text {origin} cannot be read"):
        Documents(origin, tokenizer, 199)


def test_calibration_reads_documents(source: Path, tmp_path: Path) -> None:
    """Their text, and not the JSON around it."""
    rows = lines(tmp_path / "a.jsonl", *({"text": f"{number} is a number. " * 20} for number in range(40)))
    with open_source(str(source)) as opened, progress_bars(quiet=True) as progress:
        texts = [calibration_texts(opened, (rows,), 2048, seed, progress) for seed in (0, 0, 1)]
        used, held_out = texts[0]["used"], texts[0]["held_out"]
        with pytest.raises(ConversionError, match="is too short: it has 4 tokens, and more than 512 are needed"):
            calibration_texts(opened, (lines(tmp_path / "b.jsonl", {"text": "abcd"}),), 2048, 0, progress)
    assert used.shape == (4, 512) and used.dtype == torch.int64 and len(held_out) > 0
    written = "".join(map(chr, used.flatten().tolist()))
    assert "is a number." in written and not set('{}"') & set(written)
    assert torch.equal(used, texts[1]["used"]) and not torch.equal(used, texts[2]["used"])
