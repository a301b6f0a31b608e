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
from support.packed import pack_checkpoint

from mla_converters.checkpoints.manifest import write_manifest
from vllm_mla_plugin.checkpoint.cache_formats import CacheFormat
from vllm_mla_plugin.checkpoint.latent_cache import latent_cache_json


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


SPECS = ("32x4g16/32x8g32s/a4", "32x4g16/32x4g16/a4")
MEAN = "model.layers.1.self_attn.cache_mean"


@pytest.fixture(scope="module")
def pristine_packed(pristine: tuple[Path, Path]) -> Path:
    """The conversion with a packed cache, in which layers differ."""
    formats = [CacheFormat.parse(spec) for spec in SPECS]
    ids = torch.arange(96).view(2, 48)
    packed = pack_checkpoint(pristine[1], pristine[1].with_name("packed"), formats, ids)
    write_manifest(packed)
    return packed


def test_whole_packed_model(command_line: CommandLine, pristine_packed: Path) -> None:
    code, table, complaint = command_line("verify", pristine_packed)
    assert (code, complaint) == (0, "")
    # 16 codes, 4 scales and zeros, 32 codes and a scale make 53 bytes; with codes of 4 bits alone, 40. Rows are padded.
    assert "64 numbers cached per token and layer, packed into 48 bytes" in " ".join(table.replace("│", " ").split())


def lose_a_mean(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.pop(MEAN))


def mean_not_finite(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors[MEAN][1].fill_(float("inf")))


def mean_of_another_size(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({MEAN: tensors[MEAN][:, :-1].clone()}))


def mean_nobody_takes_out(folder: Path) -> None:
    change_formats(folder, [f"{spec}/nomean" for spec in SPECS])


def formats_of_other_sizes(folder: Path) -> None:
    change_formats(folder, [SPECS[0], "40x4g16/32x4g16/a4"])


def change_formats(folder: Path, specs: list[str]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["latent_cache"] = latent_cache_json([CacheFormat.parse(spec) for spec in specs])
    (folder / "config.json").write_text(json.dumps(config))
    write_manifest(folder)


PACKED_DAMAGE = {
    lose_a_mean: ("tensors", f"{MEAN} is missing"),
    mean_not_finite: ("tensors", f"{MEAN} of"),
    mean_of_another_size: ("tensors", f"{MEAN} has shape [2, 63] where [2, 64] was expected"),
    mean_nobody_takes_out: ("tensors", "cache_mean is no part of the architecture"),
    formats_of_other_sizes: ("config", "latent_cache packs 40 + 32 numbers in layer 1, which caches 32 + 32"),
}


@pytest.mark.parametrize("damage", PACKED_DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_packed_model(
    command_line: CommandLine, damage: Callable, pristine_packed: Path, tmp_path: Path
) -> None:
    folder, report = Path(shutil.copytree(pristine_packed, tmp_path / "packed")), tmp_path / "report.json"
    damage(folder)
    name, reason = PACKED_DAMAGE[damage]
    assert command_line("verify", folder, "--json", report)[0] == 1
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
