"""The report of a verification."""

from mla_converters.reports.base import Part, Report


class Check(Part):
    """One check of a checkpoint.

    Attributes:
        name: name of the check.
        problems: the problems that it found, each in at most a sentence; empty if there are none.
        detail: more about the result.
    """

    name: str
    problems: list[str]
    detail: str = ""


class Verification(Report):
    """The checks of a converted checkpoint. Later checks are left out if a failed earlier one makes them pointless."""

    model: str
    source: str | None = None
    ok: bool
    checks: list[Check]
