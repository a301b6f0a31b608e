"""Conversions that are killed or interrupted, or lack a file or disk space, leave no half-written OUT and can go on."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from support.commands import (
    UNPACKED,
    Refused,
    contents,
    convert,
    hear_interrupts,
    running,
    vllm_mla,
    wait_for,
    without_progress,
)
from support.disk import fill
from support.files import CALIBRATION, ROOT
from support.models import RandomModel

from mla_converters.errors import StoppedError
from mla_converters.resume.work_folder import work_folder

KILLS = int(os.environ.get("KILLS", "3"))
TEXTS = ("--calibration", CALIBRATION, "--calibration", ROOT / "scripts" / "demo_text.txt")
OPTIONS = (*TEXTS, "--calibration-tokens", 1024, "--refit-steps", 8, *UNPACKED)
LAYERS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return RandomModel(layers=LAYERS).save(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that an undisturbed run writes."""
    return contents(convert(source, tmp_path_factory.mktemp("expected") / "out", *OPTIONS))


def test_killed(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """After kills at many random moments, the same command still gives the same bytes."""
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    chance = random.Random(KILLS)
    kills = 0
    while kills < KILLS:
        with running("convert", source, out, *OPTIONS) as process:
            wait_for(process, folder.exists)
            time.sleep(chance.uniform(0, 3))
            process.kill()
            process.communicate()
        if out.exists():  # the run ended before the kill, so OUT is complete and the next run starts again
            assert contents(out) == expected
            shutil.rmtree(out)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        kills += 1
        if chance.random() < 0.5:
            assert contents(convert(source, out, *OPTIONS)) == expected
            assert not folder.exists()
            shutil.rmtree(out)
    assert contents(convert(source, out, *OPTIONS)) == expected
    assert not folder.exists()


def test_goes_on_from_the_layers_that_are_done(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """A finished layer is not written again, so a mark in its weights is still there at the end."""
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    with running("convert", source, out, *OPTIONS) as process:
        wait_for(process, (folder / "layers.safetensors").exists)
    written = folder / "model" / "model.safetensors"
    content = written.read_bytes()
    size = int.from_bytes(content[:8], "little")
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    place = 8 + size + json.loads(content[8 : 8 + size])[name]["data_offsets"][0]
    with written.open("r+b") as file:
        file.seek(place)
        file.write(b"mark")
    convert(source, out, *OPTIONS)
    whole = expected["model.safetensors"]
    assert contents(out)["model.safetensors"] == whole[:place] + b"mark" + whole[place + 4 :]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--refit-steps", 9), "--refit-steps (8 then, 9 now)"),
        (("--seed", 1), "--seed (0 then, 1 now)"),
    ],
)
def test_other_options_do_not_go_on(
    changed: tuple, message: str, refusal: Refused, source: Path, tmp_path: Path
) -> None:
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    with running("convert", source, out, *OPTIONS) as process:
        wait_for(process, (folder / "texts.safetensors").exists)
    assert message in refusal("convert", source, out, *OPTIONS, *changed)
    assert (folder / "texts.safetensors").exists() and not out.exists()


def test_another_source_does_not_go_on(refusal: Refused, source: Path, tmp_path: Path) -> None:
    copy, out = shutil.copytree(source, tmp_path / "source"), tmp_path / "out"
    with running("convert", copy, out, *OPTIONS) as process:
        wait_for(process, (tmp_path / "out.partial" / "texts.safetensors").exists)
    os.utime(copy / "model.safetensors", (1, 1))
    assert "differs in model.safetensors (" in refusal("convert", copy, out, *OPTIONS)


def test_interrupted(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Ctrl-C ends the run with one sentence, and the same command goes on."""
    out, folder = tmp_path / "out", tmp_path / "out.partial"
    with running("convert", source, out, *OPTIONS) as process:
        wait_for(process, (folder / "layers.safetensors").exists)
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130, complaint
    (line,) = without_progress(complaint).strip().splitlines()
    assert line.startswith("vllm-mla: error: Interrupted.") and str(folder) in line
    assert not out.exists()
    assert contents(convert(source, out, *OPTIONS)) == expected


@pytest.fixture
def hearing_interrupts() -> Iterator[None]:
    """Make this process handle Ctrl-C, for a test that raises it here."""
    before = signal.getsignal(signal.SIGINT)
    hear_interrupts()
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("hearing_interrupts")
def test_interrupted_inside_a_library(tmp_path: Path) -> None:
    """Ctrl-C that a library turns into its own exception still counts as Ctrl-C. Such an exception alone does not."""
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match="Interrupted"), work_folder(out, False, {}):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ValueError("could not determine the shape") from error
    assert out.with_name("out.partial").is_dir() and not out.exists()
    with pytest.raises(ValueError, match="another"), work_folder(out, False, {}):
        raise ValueError("another")
    assert signal.getsignal(signal.SIGINT) is handler


def test_vanished_shard(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """If a source file vanishes during a run, the run ends with one sentence. It goes on when the file is back."""
    copy, out = shutil.copytree(source, tmp_path / source.name), tmp_path / "out"
    shard, away = copy / "model.safetensors", tmp_path / "away"
    with running("convert", copy, out, *OPTIONS) as process:
        wait_for(process, (tmp_path / "out.partial" / "layers.safetensors").exists)
        shard.rename(away)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2, complaint
    (line,) = without_progress(complaint).strip().splitlines()
    assert str(shard) in line and "bring it back" in line
    assert not out.exists()
    away.rename(shard)
    convert(copy, out, *OPTIONS)
    assert contents(out)["model.safetensors"] == expected["model.safetensors"]


OUT_OF_MEMORY = ("mla_converters.convert.calibrate", "mla_converters.proof._predictions")


@pytest.mark.parametrize("place", OUT_OF_MEMORY)
def test_device_out_of_memory(
    place: str,
    refusal: Refused,
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run ends with one sentence, and goes on when there is memory."""

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(place, fail)
        line = refusal("convert", source, out, *OPTIONS)
    assert "The memory of cpu is full" in line and "goes on from" in line
    assert (tmp_path / "out.partial" / "texts.safetensors").exists()
    assert contents(convert(source, out, *OPTIONS)) == expected


def test_second_writer(refusal: Refused, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    with FileLock(tmp_path / "out.partial" / "lock"):
        assert "Another run is writing" in refusal("convert", source, tmp_path / "out", "--method", "exact")


def test_folder_of_somebody_else(refusal: Refused, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("chapter one")
    assert "is no unfinished work" in refusal("convert", source, tmp_path / "out", "--method", "exact")
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]


def test_too_small_disk(refusal: Refused, small_disk: Path, tmp_path: Path) -> None:
    """A disk with too little space is refused before the work starts."""
    source = RandomModel(hidden=512, layers=8).save(tmp_path / "source")
    line = refusal("convert", source, small_disk / "out", "--method", "exact")
    assert "GB on disk" in line and f"{small_disk} has 0.00 GB free" in line
    assert not list(small_disk.iterdir())


def test_disk_that_fills_up(source: Path, small_disk: Path) -> None:
    """If the disk fills up during a run, the run ends with one sentence. It goes on when there is space again, although
    it was tried again before."""
    out, folder = small_disk / "out", small_disk / "out.partial"
    with running("convert", source, out, *OPTIONS) as process:
        wait_for(process, (folder / "layers.safetensors").exists)
        fill(small_disk, process)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2, complaint
    (line,) = without_progress(complaint).strip().splitlines()
    assert "No space left on device" in line and "goes on from" in line
    assert not out.exists()
    again = vllm_mla("convert", source, out, *OPTIONS)
    assert again.returncode == 2 and "GB on disk" in again.stderr and "goes on from" in again.stderr
    assert (folder / "layers.safetensors").exists()
    (small_disk / "filler").unlink()
    result = vllm_mla("convert", source, out, *OPTIONS)
    assert result.returncode == 0 and (out / "config.json").exists(), result.stderr


def test_read_only(refusal: Refused, source: Path) -> None:
    assert "cannot be written" in refusal("convert", source, "/proc/out", "--method", "exact")
