"""The numbers of a GGUF tensor, dequantised in blocks of rows."""

from functools import cache
from math import prod

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from mla_converters.checkpoints.gguf.header import StoredTensor
from mla_converters.errors import UnfinishedError

PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
"""Kinds that are stored as torch has them. All others become float32."""
BLOCK = 2**20  # numbers dequantised at a time, so that the copies that gguf makes stay small


@cache
def value_dtype(kind: GGMLQuantizationType) -> torch.dtype | None:
    """The dtype in which numbers of a kind are read; None if they are no floats, or ``gguf`` cannot dequantise them."""
    if kind in PLAIN:
        return PLAIN[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return None
    return torch.float32


def read_values(stored: StoredTensor, expert: int | None = None) -> torch.Tensor:
    """Read a tensor's numbers.

    Args:
        stored: where they are.
        expert: with it, only this entry of the first dimension is read.

    Raises:
        UnfinishedError: the file has gone, or has become shorter, since it was opened.
    """
    shape = stored.shape if expert is None else stored.shape[1:]
    rows = prod(shape[:-1])
    values = torch.empty(rows, shape[-1], dtype=PLAIN.get(stored.kind, torch.float32))
    try:
        with stored.path.open("rb") as file:
            file.seek(stored.offset + (expert or 0) * rows * stored.row_bytes)
            if stored.kind in PLAIN:
                _filled(file.readinto(values.view(torch.uint8).numpy()), rows * stored.row_bytes)
                return values.view(shape)
            step = max(1, BLOCK // shape[-1])
            for block in values.split(step):
                raw = np.fromfile(file, np.uint8, len(block) * stored.row_bytes)
                _filled(raw.size, len(block) * stored.row_bytes)
                with np.errstate(all="ignore"):  # the caller looks for NaN and infinity
                    block.copy_(torch.from_numpy(dequantize(raw.reshape(len(block), -1), stored.kind)))
    except OSError as error:
        raise UnfinishedError(f"{stored.path} cannot be read any more ({error}): bring it back.") from error
    return values.view(shape)


def _filled(found: int, expected: int) -> None:
    if found != expected:
        raise OSError(f"it has become shorter: {found} of {expected} bytes")
