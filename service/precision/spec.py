"""How a precision is written: `name[:option=value,...]`. No torch here: the front parses these too."""

from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from service.errors import PrecisionError


@dataclass(frozen=True)
class PrecisionSpec:
    """A parsed, not yet checked precision string."""

    name: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Self:
        name, colon, rest = text.strip().partition(":")
        options: dict[str, str] = {}
        for item in rest.split(",") if colon else ():
            key, equals, value = item.partition("=")
            if not (key and equals and value) or key in options:
                raise PrecisionError(
                    f"precision `{text}` cannot be read at `{item}`",
                    hint="write `name[:option=value,...]`, each option once",
                )
            options[key] = value
        return cls(name, options)


def split_list(text: str) -> list[str]:
    """`bf16,int8:threshold=0,skip=o_proj,nf4` -> [`bf16`, `int8:threshold=0,skip=o_proj`, `nf4`].

    A comma separates both modes and options; a piece with `=` continues the last mode's options.
    """
    modes: list[str] = []
    for piece in text.split(","):
        before_equals = piece.partition("=")[0]
        if "=" in piece and ":" not in before_equals and modes and ":" in modes[-1]:
            modes[-1] += f",{piece}"
        elif piece.strip():
            modes.append(piece.strip())
    return modes


class Options(BaseModel):
    """Base of a backend's option declarations: typed fields with bounds, defaults and descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid")


O = TypeVar("O", bound=Options)  # noqa: E741


def check_options(spec: PrecisionSpec, options: type[O]) -> O:
    """Strings -> typed options, or an error that lists what this precision takes."""
    try:
        return options.model_validate(spec.options)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else spec.name
        accepted = (
            ", ".join(
                f"{key} ({f.description}; default {render(f.default)})"
                for key, f in options.model_fields.items()
            )
            or "none"
        )
        given = f"{name}={spec.options.get(name, '')}"
        raise PrecisionError(
            f"option `{given}` of precision `{spec.name}`: {first['msg'].lower()}",
            hint=f"options of `{spec.name}`: {accepted}",
        ) from None


def render(value: Any) -> str:
    """An option's value as it is written on the command line."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def canonical(name: str, options: Options) -> str:
    """The one spelling of a mode: options in declared order, defaults left out."""
    changed = [
        f"{key}={render(getattr(options, key))}"
        for key, f in type(options).model_fields.items()
        if getattr(options, key) != f.default
    ]
    return f"{name}:{','.join(changed)}" if changed else name
