"""Messages to one string, by the operator's jinja2 template, as transformers renders it.

Templates come from the checkpoint or the command line, never from a client; what a client sends are messages,
whose number and size the guard and the schema bound. The sandbox keeps a downloaded template out of Python.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from service.errors import CheckpointError, RequestError

MAX_RENDERED_CHARACTERS = 32 << 20
MAX_MESSAGE_CHARACTERS = 200  # of a template's own complaint


class RefusedMessagesError(TemplateError):
    """The template called `raise_exception`."""


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; rendering passes it through."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template with the tokenizer's special tokens as its variables."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.special_tokens = dict(special_tokens)
        try:
            self.template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"chat template, line {error.lineno}: {error.message}",
                hint="name a valid one by --chat-template",
            ) from None

    @classmethod
    def load(cls, model_path: Path, override: str = "") -> Self | None:
        """`override` (a file), else chat_template.jinja, else tokenizer_config.json; None without any."""
        config_path = model_path / "tokenizer_config.json"
        config = read_object(config_path) if config_path.is_file() else {}
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name, as older checkpoints have them
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        beside = model_path / "chat_template.jinja"
        if override or beside.is_file():
            path = Path(override) if override else beside
            try:
                source = path.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"chat template `{path}` cannot be read: {error}",
                    hint="--chat-template takes a UTF-8 file",
                ) from None
        return None if source is None else cls(source, special_tokens(config))

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages -> prompt text, with the opening of the assistant's turn."""
        pieces: list[str] = []
        size = 0
        try:
            for piece in self.template.generate(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self.special_tokens,
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise RequestError(
                        f"`messages` render to more than {MAX_RENDERED_CHARACTERS} characters",
                        param="messages",
                        code="context_length_exceeded",
                    )
        except RefusedMessagesError as error:
            complaint = str(error.message)[:MAX_MESSAGE_CHARACTERS]
            raise RequestError(
                f"`messages` are refused by the model's chat template: {complaint}",
                param="messages",
                code="invalid_messages",
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            raise RequestError(
                "`messages` cannot be rendered by the model's chat template",
                param="messages",
                code="invalid_messages",
            ) from None
        return "".join(pieces)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file holds none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"`{path}` is not JSON: {error}", hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object", hint="fetch the file again")
    return value


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... of tokenizer_config.json; some checkpoints write them as objects."""
    tokens = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def refuse(message: str) -> NoReturn:
    raise RefusedMessagesError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
