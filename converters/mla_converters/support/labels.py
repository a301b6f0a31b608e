"""Names of models in tables and pictures."""

from pathlib import Path


def short_names(names: list[str]) -> list[str]:
    """The last part of each path or hub id. If two of these are equal, the names stay as they are."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names
