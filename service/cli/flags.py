"""Settings -> command line flags: a command takes any setting without naming it a second time.

config.Settings --with_settings--> typer parameters --command(**flags)--> config.load_settings
"""

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
import typer
from pydantic.fields import FieldInfo

from service.config import Settings


def bounds(field: FieldInfo) -> str:
    """`1 to 128`, `above 0`, `at least 1`: what the field's metadata allows; empty: anything of its type."""
    low = high = ""
    for limit in field.metadata:
        if isinstance(limit, annotated_types.Ge):
            low = f"at least {limit.ge}"
        elif isinstance(limit, annotated_types.Gt):
            low = f"above {limit.gt}"
        elif isinstance(limit, annotated_types.Le):
            high = str(limit.le)
    if low and high:
        return f"{low.removeprefix('at least ')} to {high}"
    return low


def kind(field: FieldInfo) -> str:
    """The type as help and documentation name it."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(map(str, get_args(field.annotation)))
    return {"int": "integer", "float": "number", "bool": "on or off", "str": "text", "Path": "path"}[
        field.annotation.__name__ if field.annotation else "str"
    ]


def default_text(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "~/.cache/halftone"
    if isinstance(field.default, bool):
        return "on" if field.default else "off"
    return str(field.default)


def help_text(field: FieldInfo) -> str:
    """Description, range and default in one line."""
    facts = [bounds(field), f"default {default_text(field)}" if default_text(field) else ""]
    return f"{field.description} ({'; '.join(fact for fact in facts if fact)})".replace(" ()", "")


def parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One keyword of a command. Values stay text: one parser, config's, judges every source alike."""
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        option = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text(field), show_default=False)
        annotation: Any = Annotated[bool | None, option]
    else:
        metavar = "|".join(get_args(field.annotation)) or kind(field).upper()
        option = typer.Option(flag, help=help_text(field), metavar=metavar, show_default=False)
        annotation = Annotated[str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def with_settings(without: Collection[str] = ()) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the command's `**settings` become one flag for each setting not in `without`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            given
            for given in inspect.signature(command).parameters.values()
            if given.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        flags = [
            parameter(name, field) for name, field in Settings.model_fields.items() if name not in without
        ]
        # typer reads a command's parameters from its signature
        command.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        return command

    return decorate
