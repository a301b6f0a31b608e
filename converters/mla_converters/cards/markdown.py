"""Pieces of Markdown."""

from collections.abc import Sequence


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table; every row is as long as its head."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def shell(*commands: str) -> str:
    """A block of commands."""
    return "\n".join(("```shell", *commands, "```"))
