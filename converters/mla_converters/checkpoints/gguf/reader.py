"""A GGUF model's tensors under the names, and in the layout, of a Hugging Face checkpoint."""

from pathlib import Path

import torch

from mla_converters.checkpoints.gguf.names import Names
from mla_converters.checkpoints.gguf.parts import Gguf
from mla_converters.checkpoints.gguf.values import read_values, value_dtype
from mla_converters.checkpoints.tensors import is_finite
from mla_converters.errors import ConversionError
from vllm_mla_plugin.checkpoint.families import Family


class GgufTensors:
    """The tensors of a GGUF model, read and dequantised one at a time; a :class:`Tensors`.

    Args:
        gguf: the model.
        family: of the model.
        heads: heads of the projections whose rows llama.cpp's converter reordered, by ``attn_q`` or ``attn_k``.
    """

    def __init__(self, gguf: Gguf, family: Family, heads: dict[str, int]) -> None:
        self._gguf = gguf
        self._names = Names(family)
        self._places = self._names.places(gguf.tensors, heads)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def files(self) -> list[Path]:
        """All parts, in order."""
        return list(self._gguf.files)

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._places)

    @property
    def stored(self) -> "GgufTensors":
        """Itself: OUT has the dequantised numbers."""
        return self

    def parts(self, name: str) -> list[str]:
        """The name itself."""
        return [name]

    def own_name(self, name: str) -> str:
        """The name that the file gives a tensor, or would give it."""
        return self._places[name].name if name in self._places else self._names.own(name)

    def ignore(self, name: str) -> None:
        """Forget a tensor, if it is there."""
        self._places.pop(name, None)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        return list(self._places[name].shape)

    def stored_as(self, name: str) -> str:
        """How a tensor's numbers are stored, in GGUF's own terms."""
        return self._places[name].stored.kind.name

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype, float32 for quantised ones; None if it cannot be read as floats."""
        return value_dtype(self._places[name].stored.kind)

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype, without reading it."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConversionError: it holds NaN or infinity.
            UnfinishedError: its file has gone since it was opened.
        """
        place = self._places[name]
        values = read_values(place.stored, place.expert)
        if not is_finite(values):
            raise ConversionError(f"Tensor {place.name} of {place.stored.path} holds NaN or infinity.")
        return values if place.heads is None else _halves(values, place.heads)


def _halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a projection ``[heads * d, ...]`` in transformers' order.

    The two numbers that RoPE turns together lie beside each other in llama.cpp's Llama, and in transformers' half a
    head apart.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
