"""A checkpoint folder's safetensors."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mla_converters.checkpoints.tensors import is_finite
from mla_converters.errors import ConversionError, UnfinishedError
from mla_converters.support.json_files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """A tensor as a shard's header describes it; ``dtype`` in safetensors' own terms."""

    path: Path
    dtype: str
    shape: list[int]


class Checkpoint:
    """The tensors of a folder, read one at a time; a :class:`mla_converters.checkpoints.tensors.Tensors`.

    Args:
        folder: with ``model.safetensors`` or shards and their index.

    Raises:
        ConversionError: there are none, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, Stored] = {}
        for path in _shards(folder):
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118
                        header = shard.get_slice(name)
                        self._tensors[name] = Stored(path, header.get_dtype(), header.get_shape())
            except (SafetensorError, OSError) as error:
                raise ConversionError(
                    f"{path} is not a readable safetensors file ({error}): download it again."
                ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def files(self) -> list[Path]:
        """The shards, sorted."""
        return sorted({stored.path for stored in self._tensors.values()})

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    def own_name(self, name: str) -> str:
        """The name itself, by which safetensors files have it."""
        return name

    def ignore(self, name: str) -> None:
        """Forget a tensor, if it is there."""
        self._tensors.pop(name, None)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        return self._tensors[name].shape

    def stored_as(self, name: str) -> str:
        """A tensor's dtype in safetensors' own terms."""
        return self._tensors[name].dtype

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype; None if it is no float of 16 bits or more."""
        return FLOAT_DTYPES.get(self._tensors[name].dtype)

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, without reading it."""
        return torch.empty(self._tensors[name].shape, dtype=self.dtype(name), device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConversionError: it holds NaN or infinity.
            UnfinishedError: its file has gone since the folder was opened.
        """
        path = self._tensors[name].path
        try:
            # Opened for each tensor: a file that stays open stays mapped, and all that was read of it in memory.
            with safe_open(path, framework="pt") as shard:
                tensor = shard.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:  # torch's own, between finding and mapping the file
            raise UnfinishedError(f"{path} cannot be read any more ({error}): bring it back.") from error
        if not is_finite(tensor):
            raise ConversionError(f"Tensor {name} of {self.folder} holds NaN or infinity.")
        return tensor


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        weight_map = read_json_object(index).get("weight_map", {})
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConversionError(f"{index} has a weight_map that does not map tensors to files.")
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE] if (folder / SINGLE).exists() else []
    if not names:
        hint = (
            "only pickle files (.bin), which are never loaded: save the model with safetensors first"
            if any(folder.glob("*.bin"))
            else f"neither {SINGLE} nor {INDEX}"
        )
        raise ConversionError(f"{folder} has no safetensors weights; there is {hint}.")
    for name in names:
        if Path(name).name != name:
            raise ConversionError(f"{index} names {name!r}, which is not a file of the same folder.")
        if not (folder / name).exists():
            raise ConversionError(f"{index} names {name}, which is missing from {folder}.")
        if not _stays_inside(folder, name):
            raise ConversionError(f"{folder / name} is a link out of the folder: put the file itself there.")
    return [folder / name for name in names]


def _stays_inside(folder: Path, name: str) -> bool:
    """Whether a file is in the folder itself; or is where the hub's cache keeps what a snapshot links to."""
    folder = folder.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    return (folder / name).resolve().parent in homes
