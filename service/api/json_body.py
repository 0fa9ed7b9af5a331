"""Bytes to JSON values, strictly: what two readers could understand differently is refused.

orjson refuses invalid UTF-8, lone surrogates, byte order marks, NaN and infinities by itself; duplicate keys,
depth and the number of objects are checked here, without a walk over the values where nothing can be found.
"""

import re
from typing import Any

import orjson

from service.errors import RequestError

MAX_DEPTH = 32
MAX_CONTAINERS = 16384  # objects and arrays in one body
MAX_KEYS = 256  # in one object

# possessive, and only ever run on valid JSON: linear in the body
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
ALL_SQUARE = bytes.maketrans(b"{}", b"[]")

# what orjson says -> (code, what we say); anything else is plain invalid JSON
REASONS = (
    ("not valid UTF-8", "invalid_unicode", "the body is not valid UTF-8"),
    ("byte order mark", "invalid_unicode", "the body begins with a byte order mark"),
    ("surrogate", "invalid_unicode", "a string holds half of a surrogate pair"),
    ("hex escape", "invalid_unicode", "a string holds a broken \\u escape"),
    ("infinity", "invalid_number", "a number is beyond what can be represented"),
    ("depth limit", "nesting_too_deep", f"the body is nested deeper than {MAX_DEPTH} levels"),
)
NOT_FINITE = re.compile(rb"[:,\[]\s*(?:NaN|-?Infinity)\b")


def parse_json(body: bytes) -> Any:
    """Raises RequestError with codes invalid_json, invalid_unicode, invalid_number, nesting_too_deep,
    duplicate_key or too_many_items."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise refusal(body, error) from None
    stripped = STRING.sub(b"", body)
    if stripped.count(b"[") + stripped.count(b"{") > MAX_CONTAINERS:
        raise RequestError(
            f"the body holds more than {MAX_CONTAINERS} objects and arrays", code="too_many_items"
        )
    skeleton = stripped.translate(ALL_SQUARE, NOT_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not skeleton:
            break
        skeleton = skeleton.replace(b"[]", b"")  # takes the innermost level away
    if skeleton:
        raise RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", code="nesting_too_deep")
    # outside of strings a colon stands behind each key, so lost keys are missing from the count
    if count_keys(value, stripped.count(b":")) != stripped.count(b":"):
        raise RequestError("an object has the same key twice", code="duplicate_key")
    return value


def count_keys(value: Any, expected: int) -> int:
    """Keys of all objects in `value`. Raises RequestError for an object with more than MAX_KEYS."""
    if isinstance(value, dict) and len(value) == expected <= MAX_KEYS:
        return expected  # nothing inside has any
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if len(item) > MAX_KEYS:
                raise RequestError(f"an object has more than {MAX_KEYS} keys", code="too_many_items")
            total += len(item)
            stack.extend(inner for inner in item.values() if isinstance(inner, (dict, list)))
        elif isinstance(item, list):
            stack.extend(inner for inner in item if isinstance(inner, (dict, list)))
    return total


def refusal(body: bytes, error: orjson.JSONDecodeError) -> RequestError:
    """Why orjson refused, in fixed words."""
    for phrase, code, message in REASONS:
        if phrase in error.msg:
            return RequestError(message, code=code)
    if NOT_FINITE.search(body):
        return RequestError("NaN and Infinity are not JSON numbers", code="invalid_number")
    if not body.strip():
        return RequestError("the body is empty", hint="send a JSON object", code="invalid_json")
    return RequestError(
        f"the body is not valid JSON (line {error.lineno}, column {error.colno})",
        hint="send a JSON object",
        code="invalid_json",
    )
