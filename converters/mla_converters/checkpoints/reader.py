"""A checkpoint folder's safetensors."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mla_converters.checkpoints.fused_experts import Part, expert_parts
from mla_converters.checkpoints.kinds import files_below, other_format, refuse_adapter
from mla_converters.checkpoints.tensors import is_finite
from mla_converters.errors import ConversionError, UnfinishedError
from mla_converters.support.json_files import read_json_object
from vllm_mla_plugin.checkpoint.families import ExpertNames

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"model-\d{1,5}-of-(?P<count>\d{1,5})\.safetensors")
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = FLOAT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""The dtypes that can be carried over; those of quantised weights are no floats of 16 bits or more."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what it is.

    Attributes:
        path: the file.
        name: in the file.
        dtype: in safetensors' own terms.
        shape: of this tensor.
        part: which part of the file's tensor this is; None for all of it.
    """

    path: Path
    name: str
    dtype: str
    shape: list[int]
    part: Part | None = None


class Checkpoint:
    """The tensors of a folder, read one at a time; a :class:`mla_converters.checkpoints.tensors.Tensors`.

    Args:
        folder: with ``model.safetensors``, or with shards and their index, or with all shards and no index.
        experts: how the family's files name the weights of experts; stacks of them are then read one by one under
            these names. None leaves stacks as they are.

    Raises:
        ConversionError: there are none, one is missing or cannot be read, or two hold the same tensor.
    """

    def __init__(self, folder: Path, experts: ExpertNames | None = None) -> None:
        self.folder = folder
        self._experts = experts
        self._tensors: dict[str, Stored] = {}
        for path in _shards(folder):
            try:
                with safe_open(path, framework="pt") as shard:
                    for name in shard.keys():  # noqa: SIM118
                        header = shard.get_slice(name)
                        self._add(Stored(path, name, header.get_dtype(), header.get_shape()))
            except (SafetensorError, OSError) as error:
                raise ConversionError(
                    f"{path} is not a readable safetensors file ({error}): download it again."
                ) from error

    def _add(self, stored: Stored) -> None:
        parts: dict[str, Part | None] = {stored.name: None}
        if self._experts is not None:
            parts = expert_parts(stored.name, stored.shape, self._experts)
        for name, part in parts.items():
            if name in self._tensors:
                files = f"{self._tensors[name].path.name} and {stored.path.name}"
                raise ConversionError(f"{self.folder} has {name} twice, in {files}: remove one of the two.")
            shape = stored.shape if part is None else [part[2] - part[1], stored.shape[2]]
            self._tensors[name] = replace(stored, shape=shape, part=part)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def files(self) -> list[Path]:
        """The shards, sorted."""
        return sorted({stored.path for stored in self._tensors.values()})

    def weight_map(self) -> dict[str, str]:
        """The file of each tensor, as an index has it, under the names that the files have."""
        return {stored.name: stored.path.name for stored in self._tensors.values()}

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._tensors)

    @property
    def stored(self) -> "Checkpoint":
        """Itself."""
        return self

    def parts(self, name: str) -> list[str]:
        """The name itself."""
        return [name]

    def own_name(self, name: str) -> str:
        """The name itself, because safetensors files use the names of a Hugging Face checkpoint."""
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
        return torch.empty(self._tensors[name].shape, dtype=DTYPES.get(self._tensors[name].dtype), device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConversionError: it holds NaN or infinity.
            UnfinishedError: its file has gone since the folder was opened.
        """
        stored = self._tensors[name]
        path = stored.path
        try:
            # Opened for each tensor: a file that stays open stays mapped, and all that was read of it in memory.
            with safe_open(path, framework="pt") as shard:
                tensor = shard.get_tensor(stored.name) if stored.part is None else _read_part(shard, stored)
        except (SafetensorError, OSError, RuntimeError) as error:  # torch's own, between finding and mapping the file
            raise UnfinishedError(f"{path} cannot be read any more ({error}): bring it back.") from error
        if not is_finite(tensor):
            raise ConversionError(f"Tensor {name} of {self.folder} holds NaN or infinity.")
        return tensor


def _read_part(shard: Any, stored: Stored) -> torch.Tensor:
    assert stored.part is not None
    index, first, end = stored.part
    return shard.get_slice(stored.name)[index : index + 1, first:end].squeeze(0)


def _shards(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index; without one, all that are named as it would name them."""
    index = folder / INDEX
    names = _indexed(index) if index.exists() else _numbered(folder)
    if not names:
        refuse_adapter(folder, str(folder))
        kind = other_format(files_below(folder)) or f"neither {SINGLE} nor {INDEX}"
        raise ConversionError(f"{folder} has no safetensors weights; there is {kind}.")
    for name in names:
        if Path(name).name != name:  # a path could name any file of the machine; links were made by whoever has it
            raise ConversionError(f"{index} names {name!r}, which is not a file of the same folder.")
        if not (folder / name).is_file():
            raise ConversionError(
                f"{name}, which holds a part of the weights, is missing from {folder}: download it again."
            )
    return [folder / name for name in names]


def _indexed(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{index} has a weight_map that does not map tensors to files.")
    return sorted(set(weight_map.values()))


def _numbered(folder: Path) -> list[str]:
    """``model.safetensors`` and ``model-00001-of-00002.safetensors``, with all parts that such a name promises."""
    names = {path.name for path in folder.glob("model*.safetensors")}
    parts = {name: match["count"] for name in names if (match := NUMBERED.fullmatch(name))}
    counts = set(parts.values())
    if len(counts) > 1:
        raise ConversionError(
            f"{folder} has no {INDEX}, and parts of several checkpoints ({', '.join(sorted(parts))}): keep one's."
        )
    promised = {f"model-{i:0{len(n)}}-of-{n}.safetensors" for n in counts for i in range(1, int(n) + 1)}
    return sorted(promised | set(parts) | names & {SINGLE})
