"""Files of prompts: our own, a user's JSONL, a ShareGPT JSON -> prompts, with the hash of the file's bytes.

bench --path--> Prompts.load() --> workload
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
BUILTIN = "builtin"  # what `--prompts` may say instead of a path
WANTED = 'want an object like {"prompt": "..."}'
FIRST_SPEAKERS = ("human", "user")


@dataclass(frozen=True)
class Prompt:
    """What is asked: a text, or token ids where `text` is empty. `output_tokens` 0: as many as the others."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    output_tokens: int = 0


@dataclass(frozen=True)
class Prompts:
    """A file's prompts in its order, stamped with the hash of its bytes."""

    items: tuple[Prompt, ...]
    source: str
    sha256: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Those that are texts."""
        return tuple(item.text for item in self.items if item.text)

    @classmethod
    def load(cls, path: Path) -> "Prompts":
        """A JSONL file with a `prompt` on each line, or a ShareGPT file, which is one JSON list.

        Raises OSError, and ValueError with the number of a bad line.
        """
        raw = path.read_bytes()
        items = tuple(from_sharegpt(path, raw) if raw.lstrip()[:1] == b"[" else from_lines(path, raw))
        if not items:
            raise ValueError(f"`{path}` holds no prompt")
        return cls(items, path.name, hashlib.sha256(raw).hexdigest())


def from_lines(path: Path, raw: bytes) -> Iterator[Prompt]:
    """`{"prompt": text or token ids, "output_tokens": N}` a line, the latter only where it differs."""
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            fields = None
        if not isinstance(fields, Mapping) or "prompt" not in fields:
            raise ValueError(f"`{path}` line {number}: {WANTED}")
        tokens = fields.get("output_tokens", 0)
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise ValueError(f"`{path}` line {number}: `output_tokens` is not a number of tokens")
        yield prompt_of(fields["prompt"], tokens, f"`{path}` line {number}")


def prompt_of(given: Any, output_tokens: int, where: str) -> Prompt:
    """A text or a list of token ids -> the Prompt. Raises ValueError."""
    if isinstance(given, str) and given:
        return Prompt(text=given, output_tokens=output_tokens)
    if isinstance(given, list) and given and all(type(id) is int and id >= 0 for id in given):
        return Prompt(token_ids=tuple(given), output_tokens=output_tokens)
    raise ValueError(f"{where}: `prompt` is neither a text nor a list of token ids")


def from_sharegpt(path: Path, raw: bytes) -> Iterator[Prompt]:
    """The first question of every conversation that has an answer, whose length in tokens is not known."""
    try:
        conversations = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"`{path}` is not JSON: {error}") from None
    for number, conversation in enumerate(conversations, 1):
        turns = conversation.get("conversations") if isinstance(conversation, Mapping) else None
        if not isinstance(turns, list):
            raise ValueError(f"`{path}` item {number} has no `conversations`, as ShareGPT's have")
        if len(turns) < 2 or turns[0].get("from") not in FIRST_SPEAKERS:
            continue
        text = turns[0].get("value")
        if isinstance(text, str) and text.strip():
            yield Prompt(text=text)
