"""The origins of text for calibration and healing."""

import re
from typing import Annotated

from pydantic import Field, field_validator

from mla_converters.errors import OptionError
from mla_converters.options.base import Flag, OptionsModel

SELF = "self"
"""Given instead of a text file, it means text that the model writes itself."""
CHAT = "chat"
"""Given instead of a text file, it means conversations in which the model writes both sides."""
WRITTEN = (SELF, CHAT)
HUB = "hub:"
"""Begins the name of a data set on the hub, where a file could be given."""
WINDOW = 512
"""Tokens in the shortest calibration window."""
KINDS = (
    "Text, .jsonl or .parquet file like what you will serve; **hub:ID[:CONFIG[:SPLIT[:COLUMN]]]**: a data set; "
    "**self**: text sampled from the source; **chat**: conversations sampled with its chat template."
)
ORIGINS = f"{KINDS} May be repeated; each has an equal share."
MIXED_ORIGINS = (
    f"{KINDS} May be repeated; all have an equal share, or the weights that follow a colon, as in `a.jsonl:0.7`."
)


def parse_weighted(origin: str) -> tuple[str, float]:
    """An origin of text without its weight, and the weight, which is 1 unless a number follows the last colon.

    Raises:
        OptionError: the weight is zero.
    """
    match = re.fullmatch(r"(.+):(\d*\.?\d+)", origin)
    if not match:
        return origin, 1.0
    if float(match[2]) == 0:
        raise OptionError(f"--text is {origin!r}, whose weight is zero: leave the text out.")
    return match[1], float(match[2])


class MixedText(OptionsModel):
    """Text to train on, from several origins.

    Attributes:
        text: text files, documents, ``self`` or ``chat``, each with a weight after a colon or without.
    """

    text: Annotated[tuple[str, ...], Flag(panel="Text")] = Field((SELF,), min_length=1, description=MIXED_ORIGINS)

    @field_validator("text")
    @classmethod
    def _weights_are_numbers(cls, text: tuple[str, ...]) -> tuple[str, ...]:
        for origin in text:
            parse_weighted(origin)
        return text
