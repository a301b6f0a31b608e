"""One of several processes that train together; ``torchrun`` starts it. See :func:`train_in_two_processes`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support.files import ROOT

from mla_converters.heal import run as healing
from mla_converters.options import HealOptions

DIES_AT = 12  # step
RUNS: dict[str, dict[str, object]] = {
    "ddp": {},
    "fsdp": {"fsdp": True},
    "all": {"fsdp": True, "train": "all", "gradient_checkpointing": True},
    "killed": {"fsdp": True},  # the last one
}
"""Options of each training."""


def train_in_two_processes(model: Path, folder: Path, options: HealOptions) -> None:
    """Train ``model`` in two processes with gloo, in every way of :data:`RUNS`.

    Each run writes ``folder/NAME``, and its losses to ``folder/NAME.json``; the last one dies at step :data:`DIES_AT`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "support.training_process", str(model), str(folder), options.model_dump_json(exclude_unset=True)]
    paths = os.pathsep.join(
        [str(ROOT / "tests"), str(ROOT), str(ROOT / "converters"), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert "killed itself" in result.stderr, result.stderr


def recorded(run: Callable[[], object], stop_at: int | None = None) -> list[float]:
    """The losses of the steps of a training. At ``stop_at``, the process dies as if it were killed."""
    losses: list[float] = []
    train = healing.train

    def spy(*arguments: object, advance: Callable[[int, float], None] | None = None) -> None:
        def record(step: int, loss: float) -> None:
            losses.append(loss)
            if step == stop_at:
                print("killed itself", file=sys.stderr, flush=True)
                os._exit(9)

        train(*arguments[:-1], record)  # type: ignore[arg-type]

    healing.train = spy
    try:
        run()
    finally:
        healing.train = train
    return losses


def main(model: Path, folder: Path, options: HealOptions) -> None:
    for name, changes in RUNS.items():
        own = options.model_copy(update=changes)
        losses = recorded(
            lambda own=own, name=name: healing.heal(model, folder / name, own, quiet=True),
            DIES_AT if name == "killed" else None,
        )
        if losses:  # only the main process gets them
            (folder / f"{name}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), HealOptions.model_validate_json(sys.argv[3]))
