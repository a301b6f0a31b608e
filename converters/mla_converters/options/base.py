"""The base of all options: how the command line shows a field, and one sentence for a wrong value."""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from mla_converters.errors import OptionError


@dataclass(frozen=True)
class Flag:
    """How the command line shows a field, in addition to the facts that pydantic knows about it.

    Attributes:
        panel: the heading under which ``--help`` lists the flag; None for the general heading.
        metavar: the placeholder of the value in ``--help``; None to derive it from the type.
        default: the description of a default of None in ``--help``.
        none: the word that a user writes for None, if there is one.
        hidden: whether only the Python API has this option.
    """

    panel: str | None = None
    metavar: str | None = None
    default: str | None = None
    none: str | None = None
    hidden: bool = False


def flag_of(field: FieldInfo) -> Flag:
    """The :class:`Flag` of a field; an empty one if the field has none."""
    return next((item for item in field.metadata if isinstance(item, Flag)), Flag())


def option_name(field: str) -> str:
    """The command line's name of a field, such as ``--kv-lora-rank``."""
    return f"--{field.replace('_', '-')}"


class OptionsModel(BaseModel):
    """Options of a command or a method. They are complete, they are checked when they are made, and cannot change.

    Raises:
        OptionError: a value is wrong, or two values contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: ModelWrapValidatorHandler["OptionsModel"]) -> "OptionsModel":
        if isinstance(values, dict):
            values = {name: _without_word(cls.model_fields.get(name), value) for name, value in values.items()}
        try:
            return handler(values)
        except ValidationError as error:
            raise OptionError(_sentence(cls, error.errors()[0])) from error


def _without_word(field: FieldInfo | None, value: Any) -> Any:
    """None if the value is the field's word for None; otherwise the value."""
    word = None if field is None else flag_of(field).none
    return None if word is not None and value == word else value


def _sentence(model: type[OptionsModel], error: ErrorDetails) -> str:
    """One sentence that says which option is wrong, and what it must be."""
    name = str(error["loc"][0])
    field = model.model_fields.get(name)
    if field is None:
        return f"{model.__name__} has no option {name!r}; it has {', '.join(model.model_fields)}."
    given = f"{option_name(name)} is {error['input']!r}"
    kind, context = error["type"], error.get("ctx", {})
    if kind in ("enum", "literal_error"):
        choices = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return f"{given}; choose one of {choices}."
    return f"{_plain(given, error['input'])}, but must be {_wanted(kind, field)}."


def _plain(given: str, value: Any) -> str:
    """Remove the quotation marks from a number that was given as text."""
    return given.replace(repr(value), value) if isinstance(value, str) and _is_number(value) else given


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _wanted(kind: str, field: FieldInfo) -> str:
    """A phrase that says which values are allowed."""
    if kind.startswith("int"):
        word = flag_of(field).none
        return "a whole number" + (f" or {word}" if word else "")
    if kind.startswith("float"):
        return "a number"
    if kind == "finite_number":
        return "a finite number"
    if kind.startswith(("greater", "less")):
        return _range(field)
    return "something else: see --help"


def _range(field: FieldInfo) -> str:
    """A field's bounds, such as ``above 0 and at most 1`` or ``1 or more``."""
    bounds = {
        name: getattr(item, name) for item in field.metadata for name in ("ge", "gt", "le") if hasattr(item, name)
    }
    if "gt" in bounds:
        return f"above {bounds['gt']}" + (f" and at most {bounds['le']}" if "le" in bounds else "")
    if "le" in bounds:
        return f"{bounds['ge']} to {bounds['le']}"
    return f"{bounds['ge']} or more"


def as_json(value: object) -> object:
    """An option's value for JSON. The value of an option that may be repeated becomes a list."""
    if isinstance(value, frozenset):
        return sorted(value)
    return list(value) if isinstance(value, tuple) else value


def _word(value: object) -> str:
    """A value as a user writes it."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def given_options(options: OptionsModel) -> list[str]:
    """The words of a command line that gives these options. Defaults are left out."""
    words: list[str] = []
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if value == field.default or flag_of(field).hidden:
            continue
        given = as_json(value)
        for item in given if isinstance(given, list) else [given]:
            words += [option_name(name), *([] if item is True else [_word(item)])]
    return words
