"""The tensors of a quantised checkpoint, dequantised when they are read."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from mla_converters.checkpoints.quantised.config import ATTENTION, Quantisation
from mla_converters.checkpoints.quantised.weights import Parts, WeightFormat
from mla_converters.checkpoints.reader import Checkpoint
from mla_converters.checkpoints.tensors import Tensors
from mla_converters.errors import ConversionError

T = TypeVar("T")
WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "scales")
CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "output_scale")
"""Names of the scales of an 8-bit KV cache, below a layer's attention or below its projections."""
SMALL_DTYPES = ("F8_E4M3", "I8")  # of a weight that has scales and is not packed


class DequantisedTensors:
    """A quantised checkpoint as if it were not; a :class:`mla_converters.checkpoints.tensors.Tensors`.

    Args:
        stored: the checkpoint.
        quantisation: how it is quantised.
        dtype: of a weight whose scales are not of 16 bits.

    Raises:
        ConversionError: a module's tensors are of no format that is read.
    """

    def __init__(self, stored: Checkpoint, quantisation: Quantisation, dtype: torch.dtype) -> None:
        self.stored = stored
        self._quantisation = quantisation
        self._dtype = dtype
        self._modules: dict[str, WeightFormat] = {}
        self._parts: dict[str, list[str]] = {}
        self._shapes: dict[str, list[int]] = {}
        self._names: list[str] | None = None
        names = stored.names()
        for format in quantisation.formats:
            for name in names:
                module, _, leaf = name.rpartition(".")
                if leaf == format.marker and module not in self._modules:
                    self._modules[module] = format
        for name in names:
            module, _, leaf = name.rpartition(".")
            if ATTENTION in f"{module}." and leaf in CACHE_SCALES:
                stored.ignore(name)
            elif module in self._modules and leaf in self._modules[module].names:
                self._parts.setdefault(f"{module}.weight", []).append(name)
        if not self._parts:
            raise ConversionError(
                f"config.json says that the weights in {stored.folder} are quantised ({quantisation.method}), but they "
                "are plain: take quantization_config out of config.json, if they are whole."
            )
        for weight, parts in self._parts.items():
            if weight in parts and stored.stored_as(weight) not in SMALL_DTYPES:
                raise ConversionError(
                    f"{weight} of {stored.folder} has scales but dtype {stored.stored_as(weight)}, so that it is not "
                    "known whether they were applied: save the model again in one form."
                )

    def __contains__(self, name: str) -> bool:
        return name in self._parts or (name in self.stored and not self._is_part(name))

    def _is_part(self, name: str) -> bool:
        return name in self._parts.get(f"{name.rpartition('.')[0]}.weight", ())

    def files(self) -> list[Path]:
        """The safetensors files."""
        return self.stored.files()

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        if self._names is None:  # a mixture of experts has a hundred thousand
            self._names = sorted({*self._parts, *(name for name in self.stored.names() if not self._is_part(name))})
        return self._names

    def own_name(self, name: str) -> str:
        """The name itself."""
        return name

    def parts(self, name: str) -> list[str]:
        """Names of the stored tensors that hold a tensor's numbers."""
        return self._parts.get(name, [name])

    def ignore(self, name: str) -> None:
        """Forget a tensor, if it is there."""
        for part in self._parts.pop(name, [name]):
            self.stored.ignore(part)
        self._names = None

    def shape(self, name: str) -> list[int]:
        """A tensor's shape."""
        if name not in self._parts:
            return self.stored.shape(name)
        if name not in self._shapes:  # some are read from the file
            format = self._modules[name.removesuffix(".weight")]
            self._shapes[name] = self._checked(name, lambda: format.shape(self._read(name)))
        return self._shapes[name]

    def stored_as(self, name: str) -> str:
        """A tensor's dtype, for messages."""
        return self._quantisation.method if name in self._parts else self.stored.stored_as(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """A tensor's dtype when it is read: that of its scales, if they are of 16 bits."""
        if name not in self._parts:
            return self.stored.dtype(name)
        scales = [self.stored.dtype(part) for part in self._parts[name] if part.rpartition(".")[2] in WEIGHT_SCALES]
        return next((dtype for dtype in scales if dtype is not None and dtype.itemsize == 2), self._dtype)

    def meta(self, name: str) -> torch.Tensor:
        """A tensor's shape and dtype."""
        if name not in self._parts:
            return self.stored.meta(name)
        return torch.empty(self.shape(name), dtype=self.dtype(name), device="meta")

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConversionError: it holds NaN or infinity, or its scales do not fit.
            UnfinishedError: its file has gone since the folder was opened.
        """
        if name not in self._parts:
            return self.stored.tensor(name)
        format = self._modules[name.removesuffix(".weight")]
        weight = self._checked(name, lambda: format.dequantise(self._read(name), self._quantisation.groups))
        return weight.to(self.dtype(name))

    def _read(self, name: str) -> Parts:
        leaves = {part.rpartition(".")[2]: part for part in self._parts[name]}
        shapes = {leaf: self.stored.shape(part) for leaf, part in leaves.items()}
        return Parts(shapes, lambda leaf: self.stored.tensor(leaves[leaf]))

    def _checked(self, name: str, compute: Callable[[], T]) -> T:
        try:
            return compute()
        except (KeyError, ValueError, IndexError, RuntimeError, TypeError) as error:
            raise ConversionError(
                f"The quantised weight {name} of {self.stored.folder} cannot be read as {self._quantisation.method} "
                f"({error}): download it again, or convert the unquantised model."
            ) from error


def dequantised(stored: Checkpoint, quantisation: Quantisation | None, config: PretrainedConfig) -> Tensors:
    """A checkpoint's tensors as plain floats.

    Args:
        stored: the checkpoint.
        quantisation: how it is quantised; None if it is not.
        config: its transformers configuration.

    Raises:
        ConversionError: see :class:`DequantisedTensors`.
    """
    if quantisation is None:
        return stored
    # transformers gives a dtype as torch's own.
    half = config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    return DequantisedTensors(stored, quantisation, half)
