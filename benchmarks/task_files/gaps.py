"""Winogrande: which of two names fills a gap. The text after the gap is scored, behind each of the names."""

from typing import Any

GAP = "_"


def beginnings(doc: dict[str, Any]) -> list[str]:
    """The text up to the gap, with each name in it."""
    return [doc["query"].split(GAP)[0] + name for name in doc["choices"]]


def rest(doc: dict[str, Any]) -> str:
    """The text after the gap."""
    return doc["query"].split(GAP)[1].strip()
