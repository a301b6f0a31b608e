"""Writing safetensors shards whose names, sizes and places are known before any tensor is.

Each tensor goes to disk as soon as it is computed, to the place planned for it, so nothing waits in memory for a shard
to fill; and the disk space of all of them is taken at the start, so it cannot run out in the middle.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from mla_converters.checkpoints.reader import DTYPES, INDEX
from mla_converters.checkpoints.tensors import is_finite
from mla_converters.errors import ConversionError
from mla_converters.support.json_files import write_json

SHARD_BYTES = 5 * 10**9
ALIGNMENT = 8  # bytes; where data begins, in the format's specification
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: a file, and the byte at which the tensor begins."""

    path: Path
    offset: int


class Shards:
    """A checkpoint's tensors on disk.

    Args:
        folder: that holds the shards.
        tensors: all of them, by name, on the meta device: shapes and dtypes.
        shard_bytes: limit on a shard.
    """

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._tensors = tensors
        self._left = set(tensors)
        self._split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_bytes)
        self._places: dict[str, Place] = {}
        self._headers: dict[Path, bytes] = {}
        self._sizes: dict[Path, int] = {}
        for file, names in self._split.filename_to_tensors.items():
            self._plan(folder / file, names)

    def _plan(self, path: Path, names: list[str]) -> None:
        # Wide dtypes first, as safetensors itself sorts, so that every tensor is aligned.
        ordered = sorted(names, key=lambda name: (-self._tensors[name].element_size(), name))
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        ends, end = {}, 0
        for name in ordered:
            tensor = self._tensors[name]
            begin, end = end, end + _bytes(tensor)
            ends[name] = begin
            header[name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        self._headers[path] = len(text).to_bytes(8, "little") + text
        data = len(self._headers[path])
        self._sizes[path] = data + end
        self._places |= {name: Place(path, data + begin) for name, begin in ends.items()}

    @property
    def total_bytes(self) -> int:
        """Of all tensors."""
        return sum(map(_bytes, self._tensors.values()))

    def allocate(self) -> bool:
        """Take the disk space, if it is not taken yet; whether it was taken now.

        Raises:
            OSError: there is not enough.
        """
        if all(path.exists() and path.stat().st_size == size for path, size in self._sizes.items()):
            return False
        for path, size in self._sizes.items():
            # Named at once what it is called in the end: nobody reads the folder before it is whole.
            with path.open("wb") as file:
                file.write(self._headers[path])
                file.flush()
                os.posix_fallocate(file.fileno(), 0, size)
        return True

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor of the planned shape, in the planned dtype.

        Raises:
            ConversionError: it holds NaN or infinity, in that dtype.
        """
        planned = self._tensors[name]
        assert tensor.shape == planned.shape, f"{name} is {tuple(tensor.shape)}, planned {tuple(planned.shape)}"
        place = self._places[name]
        converted = tensor.detach().to("cpu", planned.dtype)
        if not is_finite(converted):
            raise ConversionError(
                f"{name} would hold NaN or infinity as {planned.dtype}: the source's weights are out of range, or "
                "--dtype is too narrow for them."
            )
        content = converted.contiguous().flatten().view(torch.uint8).numpy()
        with place.path.open("r+b") as file:
            file.seek(place.offset)
            file.write(content.data)
        self._left.discard(name)

    def written_before(self, prefix: str) -> None:
        """Count the tensors whose names begin like this as written, by an earlier run."""
        self._left = {name for name in self._left if not name.startswith(prefix)}

    def finish(self) -> None:
        """Write the index, if there is more than one shard."""
        assert not self._left, f"never written: {sorted(self._left)[:5]}"
        if self._split.is_sharded:
            weight_map = dict(sorted(self._split.tensor_to_filename.items()))
            write_json(self._folder / INDEX, {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map})


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
