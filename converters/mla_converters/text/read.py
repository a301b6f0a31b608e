"""The text to score: a file, or a data set from the hub."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from mla_converters.errors import ConversionError
from mla_converters.options import TextProtocol
from mla_converters.support.packages import require

ROW_SEPARATOR = "\n\n"
"""Between the rows of a data set, as GPTQ's evaluation (arXiv 2210.17323) has it and everyone since."""


@dataclass(frozen=True)
class Text:
    """What is scored.

    Attributes:
        name: file name, or data set as the user gave it.
        content: all of it, as it is tokenised.
    """

    name: str
    content: str


def read_text(file: Path | None, dataset: str | None, protocol: TextProtocol) -> Text:
    """Read a text file or a data set; exactly one of them.

    Args:
        file: UTF-8 text. Protocol ``wikitext2`` takes each of its lines as a row; ``stream`` takes it as it is.
        dataset: ``ID[:CONFIG[:SPLIT[:COLUMN]]]`` on the hub.
        protocol: how a file is read. Rows of a data set are joined in either protocol.

    Raises:
        ConversionError: neither or both are given, or the text cannot be read, or is empty.
    """
    if file is not None and dataset is None:
        text = _read_file(file, protocol)
    elif dataset is not None and file is None:
        text = _read_dataset(dataset)
    else:
        raise ConversionError(
            "Say what to score with either --text FILE or --dataset ID, for instance "
            "--dataset Salesforce/wikitext:wikitext-2-raw-v1."
        )
    if not text.content.strip():
        raise ConversionError(f"The text in {file or dataset} is empty.")
    return text


def _read_file(path: Path, protocol: TextProtocol) -> Text:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConversionError(f"Text {path} cannot be read: {error}.") from error
    if protocol == TextProtocol.WIKITEXT2:
        content = ROW_SEPARATOR.join(wikitext_rows(content))
    return Text(path.name, content)


def wikitext_rows(content: str) -> list[str]:
    """Cut text into rows as the data set ``Salesforce/wikitext`` is cut from its files.

    A row is a line together with its line break; a blank line is an empty row.
    """
    # StringIO ends lines at line feeds only; str.splitlines would at a dozen other characters too.
    return [line if line.strip() else "" for line in io.StringIO(content)]


def _read_dataset(spec: str) -> Text:
    require("datasets", "--dataset", "run pip install datasets, or give a file with --text")
    name, config, split, column = _parse_dataset(spec)
    from datasets import disable_progress_bars, load_dataset

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # whatever the hub, the network or the files provoke
        reason = str(error).strip().split("\n")[0]
        raise ConversionError(
            f"Data set {spec!r} cannot be loaded ({reason}): check its name, configuration and split, "
            "or give a file with --text."
        ) from error
    if column not in rows.column_names:
        raise ConversionError(f"Data set {spec!r} has no column {column!r}, but {', '.join(rows.column_names)}.")
    if not all(isinstance(row, str) for row in rows[column]):
        raise ConversionError(f"Column {column!r} of data set {spec!r} holds other things than text.")
    return Text(spec, ROW_SEPARATOR.join(rows[column]))


def _parse_dataset(spec: str) -> tuple[str, str | None, str, str]:
    parts = spec.split(":")
    if not parts[0] or len(parts) > 4:
        raise ConversionError(f"--dataset is {spec!r}, but must be ID[:CONFIG[:SPLIT[:COLUMN]]].")
    name, config, split, column = parts + [""] * (4 - len(parts))
    return name, config or None, split or "test", column or "text"
