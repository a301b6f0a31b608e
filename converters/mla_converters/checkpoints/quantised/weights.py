"""Dequantises one weight: the formats in which checkpoints store the numbers of a linear map.

Every format stores small numbers ``q``, scales, and possibly zero points, and stands for ``(q - zero) * scale``. It is
computed in the dtype of the scales, because compressed-tensors and the kernels of vLLM do so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS = 512  # of a weight that are dequantised at a time, so that scales are not spread over a whole matrix
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ packs the columns of 8 numbers in an int32 (``awq/quantize/packing_utils.py``): entry ``i`` says which of
the 8 stored numbers is column ``i``."""


@dataclass(frozen=True)
class Parts:
    """The stored tensors of a quantised module.

    Attributes:
        shapes: by their names below the module.
        read: reads one of them.
    """

    shapes: dict[str, list[int]]
    read: Callable[[str], torch.Tensor]

    def optional(self, name: str) -> torch.Tensor | None:
        """Read a tensor that a module may lack."""
        return self.read(name) if name in self.shapes else None


@dataclass(frozen=True)
class Groups:
    """What a configuration says of the numbers that share a scale.

    Attributes:
        sizes: the sizes of groups and of blocks that it names, along rows or columns.
        zero_offset: what is added to a GPTQ zero point; 0 in the format ``gptq_v2``.
    """

    sizes: tuple[int, ...] = ()
    zero_offset: int = 1


@dataclass(frozen=True)
class WeightFormat:
    """A format of a weight.

    Attributes:
        marker: the tensor by which a module of this format is known.
        names: the tensors that a module may have besides a bias.
        shape: the weight's ``[rows, columns]``.
        dequantise: the weight.
    """

    marker: str
    names: frozenset[str]
    shape: Callable[[Parts], list[int]]
    dequantise: Callable[[Parts, Groups], torch.Tensor]


def scaled_weight(parts: Parts, groups: Groups) -> torch.Tensor:
    """8-bit floats or integers with a scale for the tensor, for each row, for groups of a row, or for blocks."""
    name = "weight_scale_inv" if "weight_scale_inv" in parts.shapes else "weight_scale"
    values, scale = parts.read("weight"), parts.read(name)
    return _scaled(values, scale, parts.optional("weight_zero_point"), groups, parts.optional("weight_g_idx"))


def packed_weight(parts: Parts, groups: Groups) -> torch.Tensor:
    """compressed-tensors' ``pack-quantized``: signed integers along rows, 8 of 4 bits or 4 of 8 bits in an int32."""
    rows, columns = packed_shape(parts)
    packed, scale = parts.read("weight_packed"), parts.read("weight_scale")
    bits = _bits(columns, packed.shape[1])
    half = 1 << (bits - 1)
    values = (_unpack(packed, bits)[:, :columns].short() - half).to(torch.int8)
    zeros = parts.optional("weight_zero_point")
    if zeros is not None:
        zeros = _unpack(zeros.mT, bits).mT[:rows].short() - half
    return _scaled(values, scale, zeros, groups, parts.optional("weight_g_idx"))


def packed_shape(parts: Parts) -> list[int]:
    """The shape of a ``pack-quantized`` weight."""
    rows, columns = parts.read("weight_shape").tolist()
    return [int(rows), int(columns)]


def gptq_weight(parts: Parts, groups: Groups) -> torch.Tensor:
    """GPTQ: unsigned integers ``[columns, rows]``, packed along columns; ``g_idx`` is the group of each column."""
    packed, scale, zeros = parts.read("qweight"), parts.read("scales"), parts.read("qzeros")
    bits = _gptq_bits(parts)
    values = _unpack(packed.mT, bits)
    zero_points = (_unpack(zeros, bits).short() + groups.zero_offset) & ((1 << bits) - 1)
    return _scaled(values, scale.mT, zero_points.mT, groups, parts.optional("g_idx"))


def gptq_shape(parts: Parts) -> list[int]:
    """The shape of a GPTQ weight."""
    return [parts.shapes["qweight"][1], parts.shapes["qweight"][0] * 32 // _gptq_bits(parts)]


def awq_weight(parts: Parts, groups: Groups) -> torch.Tensor:
    """AWQ: unsigned integers of 4 bits ``[columns, rows]``, packed along rows in an order of its own."""
    scale = parts.read("scales")
    values, zeros = (_unpack(parts.read(name), 4).unflatten(1, (-1, 8)) for name in ("qweight", "qzeros"))
    values, zeros = (numbers[:, :, AWQ_ORDER].flatten(1).mT for numbers in (values, zeros))
    return _scaled(values, scale.mT, zeros.short(), groups, None)


def awq_shape(parts: Parts) -> list[int]:
    """The shape of an AWQ weight."""
    return [parts.shapes["qweight"][1] * 8, parts.shapes["qweight"][0]]


_ACTIVATIONS = ("input_scale", "input_zero_point")
_COMPRESSED = ("weight_scale", "weight_zero_point", "weight_g_idx", *_ACTIVATIONS)
SCALED = WeightFormat(
    "weight_scale", frozenset({"weight", *_COMPRESSED}), lambda parts: parts.shapes["weight"], scaled_weight
)
BLOCKS = WeightFormat(
    "weight_scale_inv",
    frozenset({"weight", "weight_scale_inv", *_ACTIVATIONS}),
    lambda parts: parts.shapes["weight"],
    scaled_weight,
)
PACKED = WeightFormat(
    "weight_packed", frozenset({"weight_packed", "weight_shape", *_COMPRESSED}), packed_shape, packed_weight
)
GPTQ = WeightFormat("qweight", frozenset({"qweight", "qzeros", "scales", "g_idx"}), gptq_shape, gptq_weight)
AWQ = WeightFormat("qweight", frozenset({"qweight", "qzeros", "scales"}), awq_shape, awq_weight)


def _bits(numbers: int, packed: int) -> int:
    """How many bits each of ``numbers`` takes that are packed into so many int32.

    Raises:
        ValueError: neither 4 nor 8.
    """
    for bits in (4, 8):
        if -(-numbers * bits // 32) == packed:
            return bits
    raise ValueError(f"{numbers} numbers in {packed} int32 are neither of 4 nor of 8 bits")


def _gptq_bits(parts: Parts) -> int:
    return _bits(parts.shapes["scales"][1], parts.shapes["qzeros"][1])


def _unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned numbers ``[rows, columns * 32 / bits]`` uint8 from int32 ``[rows, columns]``, lowest bits first."""
    shifts = range(0, 32, bits)
    numbers = packed.new_empty(*packed.shape, len(shifts), dtype=torch.uint8)
    for place, shift in enumerate(shifts):
        numbers[..., place] = ((packed >> shift) & ((1 << bits) - 1)).to(torch.uint8)
    return numbers.flatten(1)


def _scaled(
    values: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    groups: Groups,
    column_groups: torch.Tensor | None,
) -> torch.Tensor:
    """``(values - zeros) * scale`` in the dtype of the scales.

    Args:
        values: ``[rows, columns]``.
        scale, zeros: ``[]`` or ``[1]`` for the whole weight; ``[rows]``; or ``[blocks of rows, groups of columns]``.
        groups: sizes of blocks and groups.
        column_groups: ``[columns]``, the group of each column; None, or -1 for columns, if groups are runs of columns.

    Raises:
        ValueError: the scales do not fit the numbers.
    """
    rows, columns = values.shape
    scale, zeros = (None if x is None else x.reshape(len(x) if x.dim() else 1, -1) for x in (scale, zeros))
    assert scale is not None
    if column_groups is not None and bool((column_groups < 0).any()):
        column_groups = None
    row_block = _group_of(rows, scale.shape[0], groups)
    column_group = _group_of(columns, scale.shape[1], groups) if column_groups is None else column_groups.long()
    weight = scale.new_empty(rows, columns)
    for first in range(0, rows, ROWS):
        some = slice(first, first + ROWS)
        part = row_block[some]
        numbers = values[some].to(scale.dtype)
        if zeros is not None:
            numbers = numbers - zeros[part][:, column_group].to(scale.dtype)
        weight[some] = numbers * scale[part][:, column_group]
    return weight


def _group_of(size: int, count: int, groups: Groups) -> torch.Tensor:
    """The group of each of ``size`` rows or columns that have ``count`` groups; the last group may be short."""
    sizes = [some for some in groups.sizes if some > 0 and -(-size // some) == count]
    if sizes:
        return torch.arange(size) // sizes[0]
    if size % count:
        raise ValueError(f"{count} groups do not fit {size} numbers")
    return torch.arange(size) // (size // count)
