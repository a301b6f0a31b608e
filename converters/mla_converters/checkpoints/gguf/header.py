"""The header of one GGUF file: its keys, and where its tensors are."""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGUF_VERSION,
    GGMLQuantizationType,
    GGUFValueType,
)

from mla_converters.errors import ConversionError

VERSIONS = (2, GGUF_VERSION)  # version 1 had counts of 32 bits
MOST_DIMENSIONS = 4
MOST_DEPTH = 4  # of arrays in arrays; no key has any
NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it.

    Attributes:
        path: the file.
        offset: byte of the file at which the tensor begins.
        kind: how numbers are stored.
        shape: as in torch; the header has the last dimension first.
    """

    path: Path
    offset: int
    kind: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        keys: by their full names; numbers, strings, and lists of them.
        tensors: by the names that the file gives them.
    """

    keys: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        ConversionError: it is no GGUF file, or is cut short.
    """
    try:
        with path.open("rb") as file:
            return _Reader(path, file, path.stat().st_size).header()
    except (ValueError, OSError) as error:
        raise ConversionError(f"{path} is not a readable GGUF file ({error}): download it again.") from error


class _Reader:
    """Reads a header from start to end. Raises ValueError where the file contradicts the format."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size

    def header(self) -> Header:
        if self._take(4) != struct.pack("<I", GGUF_MAGIC):
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version not in VERSIONS:
            raise ValueError(f"its version is {version}, where {' or '.join(map(str, VERSIONS))} was expected")
        tensor_count, key_count = self._number("Q"), self._number("Q")
        keys = dict(_distinct((self._text(), self._value(self._kind())) for _ in range(key_count)))
        tensors = dict(_distinct(self._tensor() for _ in range(tensor_count)))
        alignment = keys.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        data = -(-self.file.tell() // alignment) * alignment
        return Header(keys, {name: self._located(name, tensor, data) for name, tensor in tensors.items()})

    def _tensor(self) -> tuple[str, StoredTensor]:
        """A tensor's name and description, its offset counted from where the data begins."""
        name = self._text()
        dimensions = self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        kind = GGMLQuantizationType(self._number("I"))
        block = GGML_QUANT_SIZES[kind][0]
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"tensor {name} has shape {list(shape)}, which {kind.name} cannot store")
        return name, StoredTensor(self.path, self._number("Q"), kind, shape)

    def _located(self, name: str, tensor: StoredTensor, data: int) -> StoredTensor:
        end = data + tensor.offset + tensor.size
        if end > self.size:
            raise ValueError(f"it ends after {self.size:,} bytes, and tensor {name} ends at {end:,}")
        return StoredTensor(tensor.path, data + tensor.offset, tensor.kind, tensor.shape)

    def _value(self, kind: GGUFValueType, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self._text()
        if kind != GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0]
        if depth == MOST_DEPTH:
            raise ValueError(f"arrays are more than {MOST_DEPTH} deep")
        inner, count = self._kind(), self._number("Q")
        if inner in NUMBERS:
            return self._numbers(inner, count)
        return [self._value(inner, depth + 1) for _ in range(count)]

    def _numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _kind(self) -> GGUFValueType:
        return GGUFValueType(self._number("I"))

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _number(self, letter: str) -> int:
        return struct.unpack(f"<{letter}", self._take(struct.calcsize(letter)))[0]

    def _take(self, count: int) -> bytes:
        # Compared first, because a damaged count may be greater than the memory.
        content = self.file.read(count) if count <= self.size else b""
        if len(content) < count:
            raise ValueError("it ends in the middle of its header")
        return content


def _distinct(pairs: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    seen = set()
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"it names {name} twice")
        seen.add(name)
        yield name, value
