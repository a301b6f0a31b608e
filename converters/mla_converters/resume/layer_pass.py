"""A pass over the layers of a model whose state is kept on disk, so that a later run goes on where this one stops."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mla_converters.checkpoints.source import Source
from mla_converters.streaming.layers import SourceLayer, source_layers

Streams = dict[str, torch.Tensor]
"""The state of a pass over the layers, as named tensors: hidden states, sums, the state of a random generator."""

SAVING_SHARE = 0.05  # spend at most 5% of the time on saving


def record_bytes(tokens: int, hidden: int) -> int:
    """Bytes on disk of a record of float32 hidden states ``[tokens, hidden]``.

    They count twice, because the old record stays until the new one is complete.
    """
    return 2 * 4 * tokens * hidden


class Record:
    """One pass over the layers of a model.

    Args:
        path: the file of the record; None if the pass is not saved.

    Attributes:
        streams: the state after the layers that are done.
        done: how many layers are done.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.streams: Streams = {}
        self.done = 0
        self._saved = time.monotonic()
        self._saving = 0.0  # seconds that the last save took

    def begin(self, start: Callable[[], Streams]) -> Streams:
        """The saved streams; if there are none, those of a new start."""
        if self.path is None or not self.path.exists():
            self.streams = start()
            return self.streams
        with safe_open(self.path, framework="pt") as file:
            self.done = json.loads(file.metadata()["done"])
            # Cloned, because streams change in place, and the file would stay mapped as long as its tensors exist.
            self.streams = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return self.streams

    def forget(self) -> None:
        """Delete the saved streams."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def layers(self, source: Source, device: str, progress: Progress, description: str) -> Iterator[SourceLayer]:
        """The layers that are left. A layer counts as done when the loop asks for the next one."""
        count = source.config.num_hidden_layers
        task = progress.add_task(description, total=count, completed=self.done)
        for layer in source_layers(source, device, self.done):
            yield layer
            self.done += 1
            progress.update(task, completed=self.done)
            self._save(last=self.done == count)

    def _save(self, last: bool) -> None:
        started = time.monotonic()
        if not last and self._saving > SAVING_SHARE * (started - self._saved):
            return
        self.save()
        self._saved = time.monotonic()
        self._saving = self._saved - started

    def save(self) -> None:
        """Write the streams; a failure leaves the last record as it was.

        Raises:
            OSError: the disk is full.
        """
        if self.path is None:
            return
        partial = self.path.with_suffix(".partial")
        try:
            save_file(self.streams, partial, metadata={"done": json.dumps(self.done)})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        os.replace(partial, self.path)
