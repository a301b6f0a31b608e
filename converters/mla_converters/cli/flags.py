"""Command-line flags made from the options models: names, help, choices, defaults and bounds stand there once."""

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from mla_converters.errors import OptionError
from mla_converters.methods.registry import METHODS
from mla_converters.options import MethodOptions, OptionsModel, option_name
from mla_converters.options.base import as_json, flag_of

METHOD = "method"
NUMBERS = {int: "INTEGER", float: "NUMBER"}


def with_flags(options: type[OptionsModel]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of its options model.

    The command has a parameter ``options``. On the command line, the flags of the model's fields stand in its place;
    where the model has a method, ``--method`` and the flags of every registered method do.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            own = {name: given.pop(name) for name in list(given) if name in flags}
            command(**given, options=_options(options, own))

        signature = inspect.signature(command, eval_str=True)
        flags = {flag.name: flag for flag in _flags(options)}
        before = [p for p in signature.parameters.values() if p.name != "options"]
        positional = [p for p in before if p.default is inspect.Parameter.empty]
        rest = [p for p in before if p.default is not inspect.Parameter.empty]
        run.__signature__ = inspect.Signature([*positional, *flags.values(), *rest])  # type: ignore[attr-defined]
        run.__annotations__ = {}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _flags(options: type[OptionsModel]) -> list[inspect.Parameter]:
    flags = []
    for name, field in options.model_fields.items():
        if name == METHOD:
            flags += [_method_flag(field.default), *_method_flags()]
        elif not flag_of(field).hidden:
            flags.append(_flag(name, field, flag_of(field).panel))
    return flags


def _method_flag(default: MethodOptions) -> inspect.Parameter:
    described = "; ".join(f"**{name}**: {entry.options.summary}" for name, entry in METHODS.items())
    option = typer.Option(option_name(METHOD), help=f"{described}. [default: {default.name}]", metavar="NAME")
    return _parameter(METHOD, Annotated[str | None, option], None)


def _method_flags() -> list[inspect.Parameter]:
    return [
        _flag(name, field, f"Method {entry.options.name}")
        for entry in METHODS.values()
        for name, field in entry.options.model_fields.items()
    ]


def _flag(name: str, field: FieldInfo, panel: str | None) -> inspect.Parameter:
    """A flag whose value is text, for the model says best what is wrong with it; switches are true or false."""
    if field.annotation is bool:
        switch = typer.Option(option_name(name), help=field.description, rich_help_panel=panel)
        return _parameter(name, Annotated[bool, switch], False)
    kind: Any = list[str] | None if _repeats(field) else str | None
    option = typer.Option(
        option_name(name), help=_described(field), metavar=_metavar(field), rich_help_panel=panel, show_default=False
    )
    return _parameter(name, Annotated[kind, option], None)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation, default=default)


def _described(field: FieldInfo) -> str:
    default = flag_of(field).default
    if default is None and field.default is not None and field.default != {}:
        value = as_json(field.default)
        default = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{field.description}" + (f" [default: {default}]" if default else "")


def _repeats(field: FieldInfo) -> bool:
    """Whether the flag may be given more than once: a collection that is not written as one word."""
    return get_origin(field.annotation) in (tuple, frozenset) and flag_of(field).metavar is None


def _metavar(field: FieldInfo) -> str:
    if flag_of(field).metavar:
        return str(flag_of(field).metavar)
    kinds = [kind for kind in _leaves(field.annotation) if kind is not type(None)]
    if choices := _choices(kinds):
        return "|".join(choices)
    return NUMBERS.get(kinds[0], "FILE" if getattr(kinds[0], "__name__", "") == "Path" else "TEXT")


def _leaves(kind: Any) -> list[Any]:
    """The types that a union or a collection is made of."""
    if get_origin(kind) is Literal or not get_args(kind):
        return [kind]
    return [leaf for part in get_args(kind) if part is not Ellipsis for leaf in _leaves(part)]


def _choices(kinds: list[Any]) -> list[str]:
    for kind in kinds:
        if get_origin(kind) is Literal:
            return [str(choice) for choice in get_args(kind)]
        if isinstance(kind, type) and issubclass(kind, Enum):
            return [str(member.value) for member in kind]
    return []


def _options(model: type[OptionsModel], given: dict[str, Any]) -> OptionsModel:
    """The options that a user gave; the rest has its defaults."""
    given = {name: value for name, value in given.items() if value not in (None, [], False)}
    if METHOD not in model.model_fields:
        return model(**given)
    chosen = given.pop(METHOD, model.model_fields[METHOD].default.name)
    if chosen not in METHODS:
        raise OptionError(f"--method is {chosen!r}; choose one of {', '.join(METHODS)}.")
    own: dict[str, Any] = {}
    for name, entry in METHODS.items():
        for field in entry.options.model_fields:
            if field not in given:
                continue
            if name != chosen:
                raise OptionError(
                    f"{option_name(field)} is an option of --method {name}, not of {chosen}: leave it out."
                )
            own[field] = given.pop(field)
    return model(**given, **{METHOD: METHODS[chosen].options(**own)})
