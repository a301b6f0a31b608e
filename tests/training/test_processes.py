"""Training in two processes gives what one process gives, and goes on in another number of processes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import convert
from support.files import CALIBRATION
from support.models import RandomModel
from support.training_process import DIES_AT, recorded, train_in_two_processes

from mla_converters.errors import OptionError
from mla_converters.heal import run as healing
from mla_converters.options import HealOptions
from mla_converters.training.processes import begin_on_own_gpu, shares
from mla_converters.training.trainer import OneDevice, Ordered

CALIBRATED = ("--calibration", CALIBRATION, "--calibration-tokens", 1024, "--refit-steps", 0, "--cache-ratio", 0.5)
OPTIONS = HealOptions(
    text=(str(CALIBRATION),),
    tokens=8192,
    length=64,
    batch_size=4,
    device_batch_size=1,
    steps=30,
    loss="kl:0.9,lm:0.1",
    dtype="float32",
    device="cpu",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_two_processes(tmp_path: Path) -> None:
    """With DDP and with FSDP2, the losses are those of one process, also where all weights are trained and the teacher
    is a model of its own. One process finishes what two began."""
    source = RandomModel(tied=True, bias=True).save(tmp_path / "source")
    model = convert(source, tmp_path / "mla", *CALIBRATED, "--latent-bits", 16)
    whole = OPTIONS.model_copy(update={"train": "all"})
    alone = recorded(lambda: healing.heal(model, tmp_path / "alone", OPTIONS, quiet=True))
    alone_all = recorded(lambda: healing.heal(model, tmp_path / "alone_all", whole, quiet=True))
    train_in_two_processes(model, tmp_path, OPTIONS)
    assert len(alone) == OPTIONS.steps
    assert alone[-1] < 0.9 * alone[0] and alone_all[-1] < 0.9 * alone_all[0]
    for name, reference, folder in (("ddp", alone, "alone"), ("fsdp", alone, "alone"), ("all", alone_all, "alone_all")):
        losses = json.loads((tmp_path / f"{name}.json").read_text())
        assert losses == pytest.approx(reference, abs=1e-3), name
        expected = weights(tmp_path / folder)
        for tensor, value in weights(tmp_path / name).items():
            torch.testing.assert_close(value, expected[tensor], rtol=1e-3, atol=1e-4)
    assert not (tmp_path / "killed").exists()
    rest = recorded(lambda: healing.heal(model, tmp_path / "killed", OPTIONS, quiet=True))
    assert OPTIONS.steps - DIES_AT <= len(rest) < OPTIONS.steps
    uninterrupted = weights(tmp_path / "fsdp")
    for tensor, value in weights(tmp_path / "killed").items():
        torch.testing.assert_close(value, uninterrupted[tensor], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "rank", "expected"),
    [(None, 1, [1]), ("cuda", 6, [2]), ("cpu", 1, []), ("cuda:3", 1, []), (None, None, [])],
)
def test_each_process_begins_on_its_own_gpu(
    device: str | None, rank: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine of four GPUs. A single process has the GPU that was asked for."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))
    begin_on_own_gpu(device)
    assert chosen == expected


@pytest.mark.parametrize(("device", "expected"), [("cuda:1", [1]), ("cuda", [0]), ("cpu", [])])
def test_trainer_takes_the_device_of_the_run(
    device: str, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = OneDevice(device, output_dir=str(tmp_path), use_cpu=True)  # so that Trainer itself looks for no GPU
    assert arguments.device == torch.device(device)
    assert chosen == 2 * expected, "once by Trainer, which must not have the last word"


def test_batches_are_shared() -> None:
    assert [shares(8, None, 2), shares(8, 1, 2), shares(8, 2, 4)] == [(4, 1), (1, 4), (2, 1)]
    with pytest.raises(OptionError, match="--batch-size is 3, but must be a multiple of the 2 processes"):
        shares(3, None, 2)
    with pytest.raises(OptionError, match="--device-batch-size is 3, but must divide the 4 windows"):
        shares(8, 3, 2)


def test_all_windows_are_seen_before_any_is_seen_again() -> None:
    seen = [window["index"] for window in map(Ordered([{"index": i} for i in range(7)], 17, 3).__getitem__, range(17))]
    assert sorted(seen[:7]) == sorted(seen[7:14]) == list(range(7))
    assert seen[:7] != seen[7:14]
