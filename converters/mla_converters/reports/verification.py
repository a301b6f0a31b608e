"""The report of a verification."""

from mla_converters.reports.base import Part, Report


class Check(Part):
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        problems: each in a sentence or less; empty if there are none.
        detail: what was seen.
    """

    name: str
    problems: list[str]
    detail: str = ""


class Verification(Report):
    """The checks of a converted checkpoint; later ones are left out where an earlier one makes them pointless."""

    model: str
    source: str | None = None
    ok: bool
    checks: list[Check]
