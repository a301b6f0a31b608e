"""Names for tables and pictures."""

from pathlib import Path


def short_names(names: list[str]) -> list[str]:
    """The last part of each path or hub id; the names as they are where that would not tell them apart."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names
