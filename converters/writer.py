"""Writing a checkpoint folder that appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from mla_converters.errors import ConversionError

SHARD_BYTES = 5 * 10**9


@contextmanager
def output_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside ``out`` to write into; it takes the name ``out`` when the block succeeds.

    Args:
        out: the final name.
        force: replace ``out`` if it exists.

    Raises:
        ConversionError: ``out`` exists, or its parent cannot be written.
    """
    if out.exists() and not force:
        raise ConversionError(f"{out} exists: choose another OUT, or replace it with --force.")
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise ConversionError(f"{out} exists and is no model folder, so --force will not replace it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise ConversionError(f"{out.parent} cannot be written: {error.strerror}.") from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise ConversionError(f"{out} could not be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class ShardWriter:
    """Collects tensors and writes them as numbered safetensors shards with an index."""

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take in one tensor; a full shard goes to disk at once."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        save_file(self._pending, self._path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number}.safetensors"

    def finish(self) -> None:
        """Write what is left and give all shards their final names."""
        if self._pending:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._path(0).rename(self.folder / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._path(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {
            "metadata": {"total_size": self.total_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self.folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` the way Hugging Face writes its JSON files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
