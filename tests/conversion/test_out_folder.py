"""OUT that exists: empty folders, mount points, links; and what happens when the last step is interrupted."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import BIN, UNPACKED, Refused, contents, convert, running, vllm_mla, wait_for
from support.files import CALIBRATION
from support.models import RandomModel

from mla_converters.resume import out_folder
from mla_converters.resume.out_folder import is_mount_point, put_in_place, work_place
from mla_converters.resume.work_folder import work_folder

EXACT = ("--method", "exact")
CALIBRATED = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 8, *UNPACKED)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel(layers=6).save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(convert(source, tmp_path_factory.mktemp("expected") / "out", *EXACT))


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """A folder on which another one of the same file system is mounted, as Docker does it on one disk."""
    (tmp_path / "elsewhere").mkdir()
    point = tmp_path / "my out"
    point.mkdir()
    mount = subprocess.run(["mount", "--bind", tmp_path / "elsewhere", point], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting takes root")
    yield point
    subprocess.run(["umount", point], check=True)


def test_empty_folder(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Needs no --force."""
    out = tmp_path / "out"
    out.mkdir()
    assert contents(convert(source, out, *EXACT)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_current_folder(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    command = [BIN / "vllm-mla", "convert", str(source), ".", *map(str, EXACT)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert contents(tmp_path) == expected


def test_link_to_an_empty_folder(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The model goes where the link points to, and the link stays."""
    (tmp_path / "large disk").mkdir()
    (tmp_path / "out").symlink_to("large disk")
    convert(source, tmp_path / "out", *EXACT)
    assert (tmp_path / "out").is_symlink() and contents(tmp_path / "large disk") == expected


def test_file_system_of_its_own(source: Path, expected: dict[str, bytes], small_disk: Path) -> None:
    """All is written on the file system that is mounted at OUT, in which ext4 keeps a folder of its own."""
    (small_disk / "lost+found").mkdir()
    convert(source, small_disk, *EXACT)
    (small_disk / "lost+found").rmdir()
    found = contents(small_disk)
    assert set(found) == set(expected) and found["model.safetensors"] == expected["model.safetensors"]
    assert not list(small_disk.parent.glob("*.partial"))


def test_mount_of_the_same_file_system(
    source: Path, expected: dict[str, bytes], refusal: Refused, bound: Path, tmp_path: Path
) -> None:
    assert is_mount_point(bound) and not is_mount_point(tmp_path)
    assert contents(convert(source, bound, *EXACT)) == expected
    assert "replace it with --force" in refusal("convert", source, bound, *EXACT)
    (bound / "old.txt").write_text("of the old model")
    (bound / "config.json").write_text("{}")
    assert contents(convert(source, bound, *EXACT, "--force")) == expected
    (bound / "config.json").unlink()
    assert "is no model folder" in refusal("convert", source, bound, *EXACT, "--force")


def test_refused_leaves_the_folder(source: Path, refusal: Refused, tmp_path: Path) -> None:
    """A mount point or empty folder stays, and stays empty."""
    (tmp_path / "out").mkdir()
    refusal("convert", source, tmp_path / "out", "--calibration", "/nowhere.txt")
    assert not list((tmp_path / "out").iterdir())


def test_killed_in_an_empty_folder(source: Path, tmp_path: Path) -> None:
    """The same command goes on; meanwhile nothing takes the folder for a model."""
    whole = contents(convert(source, tmp_path / "expected", *CALIBRATED))
    out = tmp_path / "out"
    out.mkdir()
    work = out / "out.partial"
    with running("convert", source, out, *CALIBRATED) as process:
        wait_for(process, (work / "layers.safetensors").exists)
    assert [path.name for path in out.iterdir()] == ["out.partial"]
    result = vllm_mla("convert", source, out, *CALIBRATED)
    assert result.returncode == 0, result.stderr
    assert contents(out) == whole


def test_killed_in_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json comes last; who goes on puts everything in place, and other files in OUT stay."""
    out = tmp_path / "out"
    out.mkdir()
    renamed = []
    rename = os.rename

    def stop_after_one(old: Path, new: Path) -> None:
        if renamed:
            raise OSError("killed")
        renamed.append(new.name)
        rename(old, new)

    def make(model: Path) -> None:
        for name in ("a.safetensors", "config.json", "templates/b.jinja"):
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_text(name)

    monkeypatch.setattr(out_folder.os, "rename", stop_after_one)
    with pytest.raises(Exception, match="killed"), work_folder(out, False, {}) as work:
        make(work.model)
    assert renamed and renamed != ["config.json"] and not (out / "config.json").exists()
    monkeypatch.setattr(out_folder.os, "rename", rename)
    (out / "mine.txt").write_text("mine")
    with work_folder(out, False, {}) as work:
        make(work.model)
    assert sorted(path.name for path in out.iterdir()) == ["a.safetensors", "config.json", "mine.txt", "templates"]


def test_work_place(tmp_path: Path) -> None:
    """Beside OUT where one rename can end the work."""
    model, empty = tmp_path / "model", tmp_path / "empty"
    model.mkdir()
    (model / "config.json").write_text("{}")
    empty.mkdir()
    assert work_place(tmp_path / "new") == tmp_path / "new.partial"
    assert work_place(model) == tmp_path / "model.partial"
    assert work_place(empty) == empty / "empty.partial"


def test_replaced_at_once(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    for folder in (out, work / "model"):
        folder.mkdir(parents=True)
    (out / "old").touch()
    (work / "model" / "new").touch()
    put_in_place(work / "model", out, work)
    assert [path.name for path in out.iterdir()] == ["new"]
    assert (work / "replaced" / "old").exists()
