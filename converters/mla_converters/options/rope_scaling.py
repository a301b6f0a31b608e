"""The value of ``--rope-scaling``: a RoPE scaling as transformers names its parameters."""

import json
import math
from typing import Any

from mla_converters.errors import OptionError

NAME = "--rope-scaling"
TYPE = "rope_type"
ORIGINAL = "original_max_position_embeddings"
REQUIRED = {
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "linear": ("factor",),
}
OPTIONAL = {
    "yarn": (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "llama3": (),
    "linear": (),
}


def parse_rope_scaling(value: Any) -> Any:
    """The scaling as a dictionary, from JSON or from a dictionary; None for None.

    Raises:
        OptionError: it is no scaling, or of a type that is not supported.
    """
    if value is None:
        return None
    scaling = _object(value)
    kind = scaling.setdefault(TYPE, scaling.pop("type", None))
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise OptionError(f"{NAME} has {TYPE} {kind!r}; choose one of {', '.join(REQUIRED)}.")
    if missing := [name for name in REQUIRED[kind] if name not in scaling]:
        raise OptionError(f"{NAME} of type {kind} lacks {', '.join(missing)}: add it.")
    allowed = (TYPE, *REQUIRED[kind], *OPTIONAL[kind])
    if unknown := [name for name in scaling if name not in allowed]:
        raise OptionError(f"{NAME} of type {kind} has {', '.join(unknown)}; it takes {', '.join(allowed)}.")
    for name, number in scaling.items():
        if name != TYPE:
            _check(name, number)
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise OptionError(
            f"{NAME} has high_freq_factor {scaling['high_freq_factor']}, but must be above the lower one."
        )
    return scaling


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise OptionError(f"{NAME} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise OptionError(f"{NAME} is {value!r}, but must be a JSON object of parameters.")
    return dict(value)


def _check(name: str, number: Any) -> None:
    if name == "truncate":
        if not isinstance(number, bool):
            raise OptionError(f"{NAME} has truncate {number!r}, but must be true or false.")
        return
    kinds, least = (int if name == ORIGINAL else int | float), 1 if name in ("factor", ORIGINAL) else 0
    wanted = f"a {'whole ' if name == ORIGINAL else ''}number of {'1 or more' if least else 'more than 0'}"
    right = isinstance(number, kinds) and not isinstance(number, bool) and math.isfinite(number)
    if not right or number < least or number == 0:
        raise OptionError(f"{NAME} has {name} {number!r}, but must be {wanted}.")
