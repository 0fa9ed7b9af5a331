"""A recording of somebody's traffic -> requests with their times and lengths, to be sent at the same times.

`--trace FILE` --Trace.load()--> level (when), workload (what)

JSONL as Mooncake publishes it, `{"timestamp": milliseconds, "input_length": N, "output_length": N,
"hash_ids": [...]}` a line, where requests whose ids begin alike begin with the same tokens, 512 for each id;
a line with a `prompt` of its own in the place of `input_length`; or CSV with the columns of Azure's inference
traces, `TIMESTAMP,ContextTokens,GeneratedTokens`.
"""

import csv
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson

from loadtest.prompts import prompt_of

HASH_BLOCK_TOKENS = 512
CSV_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
JSON_FIELDS = {"timestamp", "input_length", "output_length", "hash_ids", "prompt"}


@dataclass(frozen=True)
class Traced:
    """One recorded request. `text` or `token_ids` where the recording has the prompt, else its length."""

    due_s: float  # after the first of the recording
    output_tokens: int
    input_tokens: int = 0
    hash_ids: tuple[int, ...] = ()
    text: str = ""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """A recording in the order of its times."""

    requests: tuple[Traced, ...]
    source: str
    sha256: str

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """Raises OSError, and ValueError with the number of a bad line."""
        raw = path.read_bytes()
        read = from_csv if raw.startswith(CSV_COLUMNS[0].encode()) else from_json_lines
        requests = sorted(read(path, raw), key=lambda request: request.due_s)
        if not requests:
            raise ValueError(f"`{path}` holds no request")
        first_s = requests[0].due_s
        return cls(tuple(moved(requests, first_s)), path.name, hashlib.sha256(raw).hexdigest())

    @property
    def has_prompts(self) -> bool:
        """Whether every request has its prompt, not only its length."""
        return all(request.text or request.token_ids for request in self.requests)

    def fitting(self, window_tokens: int) -> "Trace":
        """Those whose input and output are within a window of so many tokens."""
        kept = [
            request
            for request in self.requests
            if max(request.input_tokens, len(request.token_ids)) + request.output_tokens <= window_tokens
        ]
        return Trace(tuple(moved(kept, kept[0].due_s if kept else 0.0)), self.source, self.sha256)


def moved(requests: Sequence[Traced], zero_s: float) -> Iterator[Traced]:
    """The same requests with times from `zero_s` on."""
    for request in requests:
        yield Traced(**{**vars(request), "due_s": request.due_s - zero_s})


def from_json_lines(path: Path, raw: bytes) -> Iterator[Traced]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        where = f"`{path}` line {number}"
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError:
            fields = None
        if not isinstance(fields, Mapping) or fields.keys() - JSON_FIELDS:
            raise ValueError(f"{where}: want an object with {', '.join(sorted(JSON_FIELDS))}")
        if ("prompt" in fields) == ("input_length" in fields):
            raise ValueError(f"{where}: want one of `input_length` and `prompt`")
        yield traced(fields, where)


def traced(fields: Mapping[str, Any], where: str) -> Traced:
    """One line's fields -> the request. Raises ValueError."""
    timestamp_ms = fields.get("timestamp")
    if not isinstance(timestamp_ms, int | float) or isinstance(timestamp_ms, bool) or timestamp_ms < 0:
        raise ValueError(f"{where}: `timestamp` is not a number of milliseconds")
    hash_ids = fields.get("hash_ids", [])
    if not isinstance(hash_ids, list) or not all(type(id) is int for id in hash_ids):
        raise ValueError(f"{where}: `hash_ids` is not a list of numbers")
    if "prompt" in fields and hash_ids:
        raise ValueError(f"{where}: `hash_ids` go with `input_length`; a prompt has its own beginning")
    given = prompt_of(fields["prompt"], 0, where) if "prompt" in fields else None
    return Traced(
        due_s=timestamp_ms / 1e3,
        output_tokens=num_tokens(fields.get("output_length"), "output_length", where),
        input_tokens=0 if given else num_tokens(fields["input_length"], "input_length", where),
        hash_ids=tuple(hash_ids),
        text=given.text if given else "",
        token_ids=given.token_ids if given else (),
    )


def from_csv(path: Path, raw: bytes) -> Iterator[Traced]:
    for number, row in enumerate(csv.DictReader(raw.decode("utf-8").splitlines()), 2):
        where = f"`{path}` line {number}"
        missing = [name for name in CSV_COLUMNS if not row.get(name)]
        if missing:
            raise ValueError(f"{where}: no `{missing[0]}`; want the columns {', '.join(CSV_COLUMNS)}")
        try:
            due_s = datetime.fromisoformat(row["TIMESTAMP"].strip()).timestamp()
            input_tokens, output_tokens = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield Traced(
            due_s=due_s,
            output_tokens=num_tokens(output_tokens, "GeneratedTokens", where),
            input_tokens=num_tokens(input_tokens, "ContextTokens", where),
        )


def num_tokens(value: Any, name: str, where: str) -> int:
    """Raises ValueError for anything but a whole number of at least one."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: `{name}` is not a number of tokens")
    return value
