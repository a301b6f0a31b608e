"""``vllm-mla verify``: a whole checkpoint passes, and each kind of damage is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import CommandLine, Refused, convert
from support.models import MIXTRAL_EXPERTS, RandomModel

from mla_converters.checkpoints.manifest import write_manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and its exact conversion."""
    folder = tmp_path_factory.mktemp("pristine")
    source = RandomModel().save(folder / "source")
    return source, convert(source, folder / "mla", "--method", "exact")


@pytest.fixture
def mla(pristine: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the conversion that a test may damage."""
    return Path(shutil.copytree(pristine[1], tmp_path / "mla"))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights, and update the checksums."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder)


def test_whole_real_model(command_line: CommandLine, smollm2: Path, half: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    code, table, complaint = command_line("verify", half, "--source", smollm2, "--json", report)
    assert (code, complaint) == (0, "")
    assert "Whole." in table and "192 numbers cached" in table
    checks = {check["name"]: check for check in json.loads(report.read_text())["checks"]}
    assert list(checks) == ["files", "config", "tensors", "tokenizer", "predictions"]
    assert "KL" in checks["predictions"]["detail"]


def test_whole_mixture_of_experts(command_line: CommandLine, tmp_path: Path) -> None:
    source = RandomModel("mixtral", experts=MIXTRAL_EXPERTS).save(tmp_path / "source")
    out = convert(source, tmp_path / "mla", "--method", "exact")
    assert command_line("verify", out, "--source", source)[0] == 0


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def flip_a_bit(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"kv_lora_rank": 30}))
    write_manifest(folder)


def lose_a_tensor(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.rope_freqs"))


def nan(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    write_manifest(folder)


DAMAGE = {
    remove_tokenizer: ("files", "tokenizer.json is missing"),
    flip_a_bit: ("files", "model.safetensors was changed"),
    cut_short: ("files", "bytes where"),
    other_sizes: ("tensors", "where [64, 30] was expected"),
    lose_a_tensor: ("tensors", "model.layers.1.self_attn.rope_freqs is missing"),
    nan: ("tensors", "model.norm.weight of"),
    bad_tokenizer: ("tokenizer", "cannot be loaded"),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage(command_line: CommandLine, damage: Callable, mla: Path, tmp_path: Path) -> None:
    """The exit code is 1, and the failed check says what is wrong."""
    damage(mla)
    name, reason = DAMAGE[damage]
    report = tmp_path / "report.json"
    code, table, complaint = command_line("verify", mla, "--json", report)
    assert (code, complaint) == (1, "")
    assert "Damaged: " in table and name in table
    problems = {check["name"]: check["problems"] for check in json.loads(report.read_text())["checks"]}
    assert any(reason in problem for problem in problems[name]), problems


def test_another_function(command_line: CommandLine, pristine: tuple[Path, Path], mla: Path) -> None:
    """Every checksum is right, but the model does not compute the source's function."""
    change_tensors(mla, lambda tensors: tensors["model.layers.0.self_attn.o_proj.weight"].neg_())
    assert command_line("verify", mla)[0] == 0
    code, table, _ = command_line("verify", mla, "--source", pristine[0])
    assert code == 1 and "Damaged: predictions" in table


def test_refused(refusal: Refused, pristine: tuple[Path, Path], mla: Path, tmp_path: Path) -> None:
    source, _ = pristine
    assert "it has no config.json" in refusal("verify", tmp_path / "nowhere")
    assert "not a checkpoint that vllm-mla convert wrote" in refusal("verify", source)
    assert "does not exist" in refusal("verify", mla, "--source", tmp_path / "nowhere")
    for described in ("3", '{"bytes": "many"}'):
        (mla / "mla_manifest.json").write_text(f'{{"files": {{"config.json": {described}}}}}')
        assert "is not a manifest" in refusal("verify", mla)
    (mla / "mla_manifest.json").unlink()
    assert "it has no mla_manifest.json" in refusal("verify", mla)
