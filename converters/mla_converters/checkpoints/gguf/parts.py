"""All parts of a GGUF model, found from any one of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mla_converters.checkpoints.gguf.header import Header, StoredTensor, read_header
from mla_converters.errors import ConversionError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
COUNT, NUMBER, TENSORS = "split.count", "split.no", "split.tensors.count"
WHOLE = (0, 1)  # counts in a file that is not split; 0 where parts were joined again
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Gguf:
    """A model in one GGUF file or in several.

    Attributes:
        path: the file, or the first part.
        files: all parts, in order.
        keys: of the first part; the others have none of their own.
        tensors: of all parts, by the names that the files give them.
    """

    path: Path
    files: tuple[Path, ...]
    keys: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_parts(path: Path) -> Gguf:
    """Read the headers of a GGUF model.

    Args:
        path: the file, or any part of a split one (``NAME-00001-of-00003.gguf``).

    Raises:
        ConversionError: a file is no GGUF file, a part is missing, or parts do not belong together.
    """
    files = _files(path)
    headers = [read_header(file) for file in files]
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        count, place = header.keys.get(COUNT, 1), header.keys.get(NUMBER, 0)
        if (count, place) != (len(files), number) and (len(files) > 1 or count not in WHOLE):
            raise ConversionError(
                f"{file} says that it is one of {count} parts, with number {place} from 0, and its name does not: name "
                "the parts NAME-00001-of-00003.gguf and so on, as they were when they were split."
            )
    return Gguf(files[0], tuple(files), headers[0].keys, _joined(files, headers))


def _files(path: Path) -> list[Path]:
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    if not 1 <= int(match[2]) <= count:
        raise ConversionError(f"{path} is part {int(match[2])} of {count} by its name, which cannot be: rename it.")
    files = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise ConversionError(
            f"{path} is one of {count} parts, and {path.parent} lacks {', '.join(missing[:SHOWN])}{more}: put all "
            "parts there."
        )
    return files


def _joined(files: Sequence[Path], headers: Sequence[Header]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file, header in zip(files, headers, strict=True):
        twice = sorted(tensors.keys() & header.tensors.keys())
        if twice:
            raise ConversionError(
                f"{file} holds {twice[0]}, which an earlier part holds too: download the parts again."
            )
        tensors |= header.tensors
    expected = headers[0].keys.get(TENSORS, len(tensors))
    if expected != len(tensors):
        raise ConversionError(
            f"{files[0]} says that there are {expected} tensors, and its {len(files)} parts hold {len(tensors)}: "
            "download them again."
        )
    return tensors
