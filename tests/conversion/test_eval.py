"""``vllm-mla eval``: its numbers against an independent computation, its refusals and its output."""

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import CommandLine, Refused
from support.files import ROOT
from support.models import RandomModel, load
from transformers import AutoTokenizer

from mla_converters.evaluation.hf_engine import kl_per_token
from mla_converters.evaluation.scores import TokenScores, by_position, comparison, measures
from mla_converters.text.read import TextProtocol, read_text, wikitext_rows

DEMO_TEXT = ROOT / "scripts" / "demo_text.txt"
CUT = ("--text", DEMO_TEXT, "--windows", 2, "--length", 256)

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(command_line: CommandLine, tmp_path: Path) -> Run:
    """Run the command in this process; return its JSON report, with the printed table under ``table``."""

    def command(*arguments: object) -> dict[str, Any]:
        report = tmp_path / "report.json"
        code, table, complaint = command_line("eval", *arguments, "--json", report)
        assert (code, complaint) == (0, ""), "noise beside the table"
        return json.loads(report.read_text()) | {"table": table}

    return command


@pytest.fixture
def refused(refusal: Refused) -> Refused:
    """Run an evaluation that must be refused; return the sentence that it prints."""
    return partial(refusal, "eval")


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a vocabulary of 199, a context of 256, and one token per character."""
    return RandomModel().save(tmp_path_factory.mktemp("random") / "model")


@torch.inference_mode()
def windows_and_logits(folder: Path, windows: int = 2, length: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """A second implementation of the protocol: ids ``[windows, length]``, logits ``[windows, length - 1, vocab]``."""
    ids = AutoTokenizer.from_pretrained(folder)(DEMO_TEXT.read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: windows * length].view(windows, length)
    return ids, load(folder)(ids, use_cache=False).logits[:, :-1]


def perplexity(ids: torch.Tensor, logits: torch.Tensor) -> float:
    return math.exp(-logits.log_softmax(-1).gather(2, ids[:, 1:, None]).mean().item())


def test_all_measures_on_the_real_model(run: Run, smollm2: Path, exact: Path, half: Path, tmp_path: Path) -> None:
    """Two conversions are compared with their source. Every number equals the one that is computed here."""
    report = run(half, exact, "--reference", smollm2, *CUT)
    ids, reference_logits = windows_and_logits(smollm2)
    _, half_logits = windows_and_logits(half)
    rows = {row["name"]: row for row in report["models"]}
    damaged, same = rows[str(half)], rows[str(exact)]

    assert report["reference"]["perplexity"] == pytest.approx(perplexity(ids, reference_logits), rel=1e-4)
    assert damaged["perplexity"] == pytest.approx(perplexity(ids, half_logits), rel=1e-4)
    assert damaged["perplexity_ratio"] == pytest.approx(
        damaged["perplexity"] / report["reference"]["perplexity"], rel=1e-9
    )
    log_p, log_q = reference_logits.log_softmax(-1), half_logits.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert damaged["kl"] == pytest.approx(divergence.mean().item(), rel=1e-3)
    agreement = (reference_logits.argmax(-1) == half_logits.argmax(-1)).float().mean().item()
    assert damaged["top1_agreement"] == pytest.approx(agreement, abs=0.005)
    assert same["perplexity_ratio"] == pytest.approx(1, abs=1e-4) and same["kl"] == pytest.approx(0, abs=1e-5)

    losses = -log_q.gather(2, ids[:, 1:, None]).squeeze(2)
    ranges = {"1-63": slice(63), "64-127": slice(63, 127), "128-255": slice(127, 255)}
    for measure, values, rel in (("loss", losses, 1e-4), ("kl", divergence, 1e-3)):
        shown = damaged[f"{measure}_by_position"]
        assert shown == pytest.approx({k: values[:, tokens].mean().item() for k, tokens in ranges.items()}, rel=rel)
        assert all(f"{value:.3f}" in report["table"] for value in shown.values())
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    scored_bytes = sum(len(tokenizer.decode(window[1:]).encode()) for window in ids)
    assert damaged["bits_per_byte"] == pytest.approx(losses.sum().item() / math.log(2) / scored_bytes, rel=1e-4)

    config = json.loads((half / "config.json").read_text())
    assert damaged["cached_per_token_and_layer"] == config["kv_lora_rank"] + config["qk_rope_head_dim"]
    assert report["reference"]["cached_per_token_and_layer"] == same["cached_per_token_and_layer"] == 384
    assert report["text"]["tokens_scored"] == 2 * 255 and report["text"]["name"] == DEMO_TEXT.name
    assert report["command"].startswith("vllm-mla eval ")
    assert {"torch", "transformers", "vllm-mla-plugin"} <= report["versions"].keys()
    assert f"{damaged['perplexity']:.4f}" in report["table"]


def with_context(model: Path, context: int, folder: Path) -> Path:
    """A copy of the model whose configuration has a shorter context."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


@pytest.mark.engine
def test_vllm_engine(run: Run, smollm2: Path, exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine gives transformers' numbers, even for windows that fill the context, and reports no KL."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    reference = with_context(smollm2, 256, tmp_path / "reference")
    report = run(exact, "--reference", reference, *CUT, "--engine", "vllm")
    expected = perplexity(*windows_and_logits(smollm2))
    (row,) = report["models"]
    assert report["reference"]["perplexity"] == pytest.approx(expected, rel=5e-3)
    assert row["perplexity"] == pytest.approx(expected, rel=5e-3)
    assert row["top1_agreement"] > 0.99
    assert "kl" not in row and "kl_by_position" not in row
    assert "—" in report["table"] and "use --engine hf" in report["table"]
    assert "vllm" in report["versions"] and "device" not in report


@pytest.mark.engine
def test_vllm_failure(refused: Refused, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's CPU attention has no kernel for heads of 16. Its message arrives in one sentence."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    line = refused(random_model, *CUT, "--length", 64, "--engine", "vllm")
    assert "vLLM cannot score" in line and "head_dim=16" in line


def test_vllm_that_dies(refused: Refused, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence has the last words of the engine's process, and an advice."""
    monkeypatch.setattr("mla_converters.engines.process.WORKER", "no.such.module")
    line = refused(random_model, *CUT, "--engine", "vllm")
    assert "exit code 1" in line and "try --engine hf" in line
    assert "its last words were: ModuleNotFoundError: No module named 'no'" in line


def test_wikitext2_protocol(run: Run, random_model: Path, tmp_path: Path) -> None:
    """Rows are lines with their line breaks, or empty. They are joined by blank lines, and all text is scored."""
    lines = " = Title = \n \n" + "".join(f" Line {i} . \n" for i in range(50))
    (tmp_path / "wiki.raw").write_text(lines)
    assert wikitext_rows(lines)[:3] == [" = Title = \n", "", " Line 0 . \n"]
    assert wikitext_rows("a\x85b\u2028c\n\nd") == ["a\x85b\u2028c\n", "", "d"]
    text = read_text(tmp_path / "wiki.raw", None, TextProtocol.WIKITEXT2)
    assert text.content.startswith(" = Title = \n\n\n\n\n Line 0 . \n\n\n Line 1 . \n")
    assert read_text(tmp_path / "wiki.raw", None, TextProtocol.STREAM).content == lines
    arguments = ("--text", tmp_path / "wiki.raw", "--protocol", "wikitext2", "--length", 128)
    report = run(random_model, *arguments)
    assert report["text"]["windows"] == len(text.content) // 128
    assert run(random_model, *arguments, "--windows", 2)["text"]["windows"] == 2


def test_wikitext2_defaults_to_2048(refused: Refused, smollm2: Path) -> None:
    assert "--length 2048 need 2048" in refused(smollm2, "--text", DEMO_TEXT, "--protocol", "wikitext2")


def test_measures_of_known_numbers() -> None:
    losses = torch.arange(1.0, 300.0).expand(2, -1)
    assert by_position(losses) == {"1-63": 32, "64-127": 95.5, "128-255": 191.5, "256-299": 277.5}
    assert by_position(torch.ones(1, 1)) == {"1-1": 1}
    two_bits = TokenScores(torch.full((1, 4), 2 * math.log(2)), torch.tensor([[1, 2, 3, 4]]))
    assert measures(two_bits, 8)["perplexity"] == pytest.approx(4)
    assert measures(two_bits, 8)["bits_per_byte"] == pytest.approx(1)
    assert measures(two_bits, None)["bits_per_byte"] is None
    one_bit = TokenScores(torch.full((1, 4), math.log(2)), torch.tensor([[1, 2, 3, 9]]))
    assert comparison(two_bits, one_bit) == {
        "perplexity_ratio": pytest.approx(2),
        "perplexity_ratio_stderr": None,
        "kl": None,
        "kl_by_position": None,
        "top1_agreement": 0.75,
    }


def test_standard_error_of_a_ratio() -> None:
    """The windows' mean losses exceed the reference's by 0, 1 and 2 nats: the ratio is e, with error e / sqrt(3)."""
    none = TokenScores(torch.rand(3, 4), torch.zeros(3, 4, dtype=torch.int64))
    lost = torch.tensor([[0.0, 0, 0, 0], [2, 0, 1, 1], [2, 2, 2, 2]])
    compared = comparison(TokenScores(none.losses + lost, none.top1), none)
    assert compared["perplexity_ratio"] == pytest.approx(math.e, rel=1e-6)
    assert compared["perplexity_ratio_stderr"] == pytest.approx(math.e / math.sqrt(3), rel=1e-6)


def test_kl_of_known_distributions() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = log(4/3) / 2, even if logits are shifted, and for more than one chunk."""
    reference = torch.tensor([1.0, 1.0]).expand(300, -1)
    model = torch.tensor([0.25, 0.75]).log().expand(300, -1) + 5
    assert torch.allclose(kl_per_token(reference, model), torch.full((300,), math.log(4 / 3) / 2), atol=1e-6)
    assert torch.equal(kl_per_token(model, model), torch.zeros(300))


def test_plot(run: Run, random_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes are bytes, so that packed caches of as many numbers lie apart."""
    axes = pytest.importorskip("matplotlib.axes", reason="--plot needs matplotlib").Axes
    points, plot = [], axes.plot

    def spy(self: Any, *arguments: Any) -> Any:
        points.append(arguments[:2])
        return plot(self, *arguments)

    monkeypatch.setattr(axes, "plot", spy)
    report = run(random_model, "--reference", random_model, *CUT, "--plot", tmp_path / "sizes.png")
    (model,) = report["models"]
    assert points == [(model["bytes_per_token_and_layer"], model["perplexity"])]
    assert model["bytes_per_token_and_layer"] == 2 * model["cached_per_token_and_layer"]
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written(
    option: str, command_line: CommandLine, refused: Refused, random_model: Path, read_only: Path, tmp_path: Path
) -> None:
    """It is refused before any work. If it fails only afterwards, the numbers are shown all the same."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    line = refused(random_model, *CUT, option, read_only / "file.png")
    assert "file.png, which cannot be written: name a file in another place" in line
    (tmp_path / "full.png").symlink_to("/dev/full")
    code, table, complaint = command_line("eval", random_model, *CUT, option, tmp_path / "full.png")
    assert code == 2 and "perplexity" in table
    assert f"{tmp_path / 'full.png'} cannot be written: No space left on device.\n" in complaint


OPTIONS = {
    "no-text": ((), "either --text FILE or --dataset ID"),
    "both": (("--text", DEMO_TEXT, "--dataset", "a/b"), "either --text FILE or --dataset ID"),
    "missing": (("--text", "/nowhere.txt"), "Text /nowhere.txt cannot be read"),
    "protocol": ((*CUT, "--protocol", "c4"), "choose one of stream, wikitext2"),
    "engine": ((*CUT, "--engine", "jax"), "choose one of hf, vllm"),
    "dtype": ((*CUT, "--dtype", "int8"), "choose one of float32, bfloat16, float16"),
    "device": ((*CUT, "--device", "toaster"), "which is not a device"),
    "vllm-device": ((*CUT, "--engine", "vllm", "--device", "cuda"), "leave it out"),
    "windows": ((*CUT, "--windows", 0), "--windows is 0, but must be 1 or more"),
    "length": ((*CUT, "--length", 1), "--length is 1, but must be at least 2"),
    "context": ((*CUT, "--length", 257), "give --length 256 or less"),
    "short": ((*CUT, "--windows", 100), "is too short: it has"),
    "plot": ((*CUT, "--plot", "picture.jpg"), "must end in .png"),
    "json": ((*CUT, "--json", "/nowhere/report.json"), "not a file in an existing folder"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_refused_options(refused: Refused, case: str, random_model: Path) -> None:
    options, reason = OPTIONS[case]
    assert reason in refused(random_model, *options)


def test_refused_text(refused: Refused, random_model: Path, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00\xd8")
    assert "is empty" in refused(random_model, "--text", empty)
    assert "cannot be read" in refused(random_model, "--text", binary)


def test_refused_models(refused: Refused, random_model: Path, tmp_path: Path) -> None:
    assert "nowhere does not exist" in refused(tmp_path / "nowhere", *CUT)
    assert "has no config.json" in refused(tmp_path, *CUT)
    assert "not a .gguf" in refused(DEMO_TEXT, *CUT)
    assert "neither a folder here nor a model" in refused("someone/some-model", *CUT)
    assert "is given twice" in refused(random_model, f"{random_model}/", *CUT)


def test_refused_weights(refused: Refused, random_model: Path, tmp_path: Path) -> None:
    """A checkpoint that lacks tensors is refused, because it would be scored with random tensors instead."""
    model = Path(shutil.copytree(random_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "lack 9 tensors, such as model.layers.2." in refused(model, *CUT)
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(model, *CUT)


def test_refused_vocabularies(refused: Refused, random_model: Path, smollm2: Path, tmp_path: Path) -> None:
    assert "has a vocabulary of 199 tokens and the reference" in refused(random_model, "--reference", smollm2, *CUT)
    assert "tokenise the text differently" in refused(random_model, smollm2, *CUT)
    model = Path(shutil.copytree(random_model, tmp_path / "model"))
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(tokenizer.replace('"e": 101', '"e": 4000'))
    assert "beyond the vocabulary" in refused(model, *CUT)


def test_missing_packages(refused: Refused, random_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mla_converters.support.packages.find_spec", lambda module: None)
    assert "--engine vllm needs the package vllm" in refused(random_model, *CUT, "--engine", "vllm")
    assert "--dataset needs the package datasets" in refused(random_model, "--dataset", "a/b")
    assert "--plot needs the package matplotlib" in refused(random_model, *CUT, "--plot", "picture.png")


def test_dataset(refused: Refused, run: Run, random_model: Path, tmp_path: Path) -> None:
    """The rows of a data set are joined by blank lines. Here it is a local folder that ``datasets`` reads."""
    pytest.importorskip("datasets", reason="--dataset needs datasets")
    assert "must be ID[:CONFIG" in refused(random_model, "--dataset", "a:b:c:d:e")
    assert "cannot be loaded" in refused(random_model, "--dataset", "someone/some-text")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": "x" * 40, "number": 1}, {"text": "y" * 40, "number": 2}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(random_model, "--dataset", folder, "--windows", 1, "--length", 82)
    assert report["text"]["bytes_scored"] == 81
    assert "has no column 'words'" in refused(random_model, "--dataset", f"{folder}:::words")
    assert "other things than text" in refused(random_model, "--dataset", f"{folder}:::number")
