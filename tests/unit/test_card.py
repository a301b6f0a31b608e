"""The model card: its text, that the hub can read it, and that the same report gives the same card."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from support.commands import UNPACKED, CommandLine, Refused, convert
from support.files import CALIBRATION
from support.models import RandomModel

from mla_converters.cards.card import source_card, update_card, write_card

PER_LAYER = [{"energy_kept": 0.9, "output_error": 0.125}, {"energy_kept": 0.75, "output_error": 0.375}]
COMMAND = "vllm-mla convert 'my model' out"
SOURCE_CARD = {"license": "other", "license_name": "lab-1.0", "license_link": "LICENSE", "language": ["en", "de"]}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    source = RandomModel().save(folder / "source")
    options = ("--calibration", CALIBRATION, "--calibration-tokens", 2048, "--refit-steps", 0, *UNPACKED)
    return convert(source, folder / "mla", *options)


@pytest.fixture
def mla(pristine: Path, tmp_path: Path) -> Path:
    """A conversion (latent 16 + rope 16 of 64, 2 layers) that a test may change."""
    return Path(shutil.copytree(pristine, tmp_path / "mla"))


def change_report(folder: Path, **changes: object) -> None:
    path = folder / "conversion_report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_it_says(mla: Path) -> None:
    change_report(mla, per_layer=PER_LAYER, command=COMMAND, source_card={"base_model": "lab/model", **SOURCE_CARD})
    assert write_card(mla) == [mla / "README.md", mla / "per_layer.png"]
    card = ModelCard.load(mla / "README.md")
    assert card.data.to_dict() == {
        "base_model": "lab/model",
        "base_model_relation": "finetune",
        "library_name": "vllm",
        "pipeline_tag": "text-generation",
        "tags": ["mla", "multi-head-latent-attention", "vllm"],
        **SOURCE_CARD,
    }
    for expected in (
        "vllm serve .\n",
        f"\n{COMMAND}\n",
        "2,048 tokens of `LICENSE`, seed 0",
        "| numbers cached per token and layer | 64 | 32 |",
        "| KV cache per token, at 16 bits | 256 bytes | 128 bytes |",
        "mean of layers | 0 | 0.2500 |",
        "(per_layer.png)",
        "up to 256 tokens",
        "[lab-1.0](LICENSE)",
    ):
        assert expected in card.text, expected


def test_several_calibration_texts(mla: Path) -> None:
    change_report(mla, calibration={"origins": ["my.txt", "self"], "tokens": 4096, "seed": 1})
    write_card(mla)
    text = (mla / "README.md").read_text()
    assert "4,096 tokens of `my.txt` and text that the source wrote, seed 1" in text


def test_packed_cache(mla: Path) -> None:
    """The card names the format, its bytes, and how to undo it; a report without these fields says nothing of it."""
    write_card(mla)
    assert "packed" not in (mla / "README.md").read_text()
    size = {"source": 128, "mla": 24}
    change_report(mla, latent_cache="20x4g20/12x6g12/a4", bytes_per_token_and_layer=size, cache_ratio=24 / 128)
    write_card(mla)
    text = (mla / "README.md").read_text()
    for expected in (
        "18.8% of its KV cache",
        "--hf-overrides '{\"latent_cache\": null}'",
        "\n- Cached per token and layer: `kv_lora_rank` 20 + `qk_rope_head_dim` 12\n",
        "\n- Cache format: `20x4g20/12x6g12/a4`, 18.8% of the bytes of the source's 16-bit cache",
        "| numbers cached per token and layer | 64 | 32 |",
        "| KV cache per token, packed; the source's at 16 bits | 256 bytes | 48 bytes |",
    ):
        assert expected in text, expected
    change_report(mla, latent_cache=["20x4g20/12x6g12/a4", "20x4g20/12x4g12/a4"])
    write_card(mla)
    assert "`20x4g20/12x6g12/a4` (1 layer), `20x4g20/12x4g12/a4` (1 layer), 18.8%" in (mla / "README.md").read_text()


def test_picture(mla: Path) -> None:
    """The picture is a PNG without dates and versions. It is left out if there is nothing to draw."""
    change_report(mla, per_layer=None)
    write_card(mla)
    assert "per_layer.png" not in (mla / "README.md").read_text()
    change_report(mla, per_layer=PER_LAYER)
    write_card(mla)
    picture = (mla / "per_layer.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and not any(chunk in picture for chunk in (b"tEXt", b"tIME", b"atplotlib"))


def test_without_matplotlib(mla: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mla / "per_layer.png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    change_report(mla, per_layer=PER_LAYER)
    assert write_card(mla) == [mla / "README.md"]
    assert "0.2500" in (mla / "README.md").read_text() and not (mla / "per_layer.png").exists()


def test_same_report_same_bytes(mla: Path, tmp_path: Path) -> None:
    change_report(mla, per_layer=PER_LAYER, command=COMMAND, source_card=SOURCE_CARD)
    again = Path(shutil.copytree(mla, tmp_path / "elsewhere"))
    for ours, theirs in zip(write_card(mla), write_card(again), strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_unknown_licence(mla: Path) -> None:
    write_card(mla)
    card = ModelCard.load(mla / "README.md")
    assert card.data.license is None and card.data.base_model is None
    assert "not known here" in card.text


CARDS = {
    "none": (None, {}),
    "no-metadata": (b"# A model\n", {}),
    "broken-yaml": (b"---\nlicense: [\n---\n", {}),
    "no-text": (b"\xff\xfe\x00", {}),
    "wrong-types": (b"---\nlicense: 5\nlanguage: {en: 1}\nlicense_name: ''\n---\n", {}),
    "one": (b"---\nlicense: mit\nlanguage: en\nbase_model: its/own\n---\n", {"license": "mit", "language": "en"}),
}


@pytest.mark.parametrize("case", CARDS)
def test_source_card(case: str, tmp_path: Path) -> None:
    """The usable entries of a source's card are taken. A broken card gives no error."""
    content, expected = CARDS[case]
    if content is not None:
        (tmp_path / "README.md").write_bytes(content)
    assert source_card(tmp_path, None) == expected
    assert source_card(tmp_path, "lab/model") == expected | {"base_model": "lab/model"}


def test_command(command_line: CommandLine, pristine: Path, mla: Path, tmp_path: Path) -> None:
    """The command adds a measurement to the card, and the folder still verifies."""
    source, report = pristine.parent / "source", tmp_path / "eval.json"
    options = ("--reference", source, "--text", CALIBRATION, "--windows", 1, "--length", 200, "--json", report)
    assert command_line("eval", mla, *options)[0] == 0
    code, told, complaint = command_line("card", mla, "--eval", report)
    assert (code, complaint) == (0, "") and f"Wrote {mla / 'README.md'}" in told
    measured = json.loads(report.read_text())
    theirs, ours = measured["reference"]["perplexity"], measured["models"][0]["perplexity"]
    text = (mla / "README.md").read_text()
    assert f"| perplexity | {theirs:.2f} | {ours:.2f} |" in text
    assert f"--windows 1 --length 200 --json {report}\n" in text
    assert command_line("verify", mla)[0] == 0


def test_only_the_card_is_blessed(command_line: CommandLine, mla: Path) -> None:
    """Writing the card does not hide damage to other files."""
    (mla / "tokenizer.json").unlink()
    update_card(mla)
    code, told, _ = command_line("verify", mla)
    assert code == 1 and "tokenizer.json is missing" in told


def evaluation_of(name: str, file: Path, **more: object) -> Path:
    """A report on a model of this name, in a file."""
    text = {"name": "t", "sha256": "", "protocol": "stream", "windows": 1, "length": 2, "tokens_scored": 1}
    model = {"name": name, "perplexity": 2.0, "kl": 0.5, "top1_agreement": 0.75}
    run = {"engine": "hf", "dtype": "float32", "versions": {}, "seconds": 1.0, "peak_rss_bytes": 1}
    file.write_text(json.dumps({"text": text, "models": [model], **run, **more}))
    return file


@pytest.mark.parametrize("name", ["lab/larger", "/elsewhere/source"])
def test_reference_that_is_not_the_source(command_line: CommandLine, name: str, mla: Path, tmp_path: Path) -> None:
    """Its numbers are in a table of their own, under its name."""
    report = evaluation_of(str(mla), tmp_path / "eval.json", reference={"name": name, "perplexity": 1.5})
    assert command_line("card", mla, "--eval", report)[0] == 0
    before, table = (mla / "README.md").read_text().split(f"|  | `{name}` | MLA |")
    assert "|  | source | MLA |" in before
    assert table.startswith(
        "\n| --- | --- | --- |\n| perplexity | 1.50 | 2.00 |\n"
        f"| KL divergence from `{name}`, nats per token | 0 | 0.5000 |\n"
        f"| likeliest token is `{name}`'s | 100% | 75.0% |\n\n"
    )


def test_evaluation_from_another_machine(command_line: CommandLine, mla: Path, tmp_path: Path) -> None:
    """Of a path that is not here, the last part counts."""
    assert command_line("card", mla, "--eval", evaluation_of("/elsewhere/mla", tmp_path / "eval.json"))[0] == 0


def of_another_model(folder: Path) -> tuple[object, ...]:
    return (folder, "--eval", evaluation_of("other/model", folder.parent / "eval.json"))


def of_a_namesake(folder: Path) -> tuple[object, ...]:
    other = folder.parent / "elsewhere" / folder.name
    other.mkdir(parents=True)
    return (folder, "--eval", evaluation_of(str(other), folder.parent / "eval.json"))


def of_nothing(folder: Path) -> tuple[object, ...]:
    report = folder.parent / "eval.json"
    report.write_text(json.dumps({"models": 5}))
    return (folder, "--eval", report)


def without_numbers(folder: Path) -> tuple[object, ...]:
    report = folder.parent / "eval.json"
    report.write_text(json.dumps({"models": [{"name": str(folder)}]}))
    return (folder, "--eval", report)


def broken_report(folder: Path) -> tuple[object, ...]:
    change_report(folder, layers="many")
    return (folder,)


def broken_layers(folder: Path) -> tuple[object, ...]:
    change_report(folder, per_layer=[{"energy_kept": "most"}])
    return (folder,)


REFUSED = {
    of_another_model: "is not of mla, but of other/model",
    of_a_namesake: "is not of mla, but of /",
    of_nothing: "is not a report that vllm-mla eval",
    without_numbers: "is not a report that vllm-mla eval",
    broken_report: "is not a report that vllm-mla convert wrote",
    broken_layers: "is not a report that vllm-mla convert wrote",
    lambda folder: (folder, "--eval", folder / "nowhere.json"): "is not a file",
    lambda folder: (folder.parent,): "has no conversion_report.json",
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda damage: damage.__name__)
def test_refused(refusal: Refused, damage: Callable[[Path], tuple[object, ...]], mla: Path) -> None:
    assert REFUSED[damage] in refusal("card", *damage(mla))
