"""Bytes to JSON values, strictly: what two readers could understand differently is refused.

orjson refuses invalid UTF-8, lone surrogates, byte order marks, NaN and infinities by itself. What it is
given is bounded here, and duplicate keys are found afterwards, all by counting characters outside of strings:
the cost of a hostile body is that of a few passes in C.
"""

import re
from typing import Any

import orjson

from service.errors import RequestError

MAX_DEPTH = 32
MAX_CONTAINERS = 16384  # objects and arrays in one body
MAX_STRINGS = 65536
MAX_ITEMS = 1 << 20  # of all arrays and objects: token ids above all
MAX_KEYS = 300  # in one object

NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
ALL_SQUARE = bytes.maketrans(b"{}", b"[]")

# what orjson says -> (code, what we say); anything else is plain invalid JSON
REASONS = (
    ("not valid UTF-8", "invalid_unicode", "the body is not valid UTF-8"),
    ("byte order mark", "invalid_unicode", "the body begins with a byte order mark"),
    ("surrogate", "invalid_unicode", "a string holds half of a surrogate pair"),
    ("hex escape", "invalid_unicode", "a string holds a broken \\u escape"),
    ("infinity", "invalid_number", "a number is beyond what can be represented"),
)
NOT_FINITE = re.compile(rb"[:,\[]\s*(?:NaN|-?Infinity)\b")


def parse_json(body: bytes) -> Any:
    """Raises RequestError with codes invalid_json, invalid_unicode, invalid_number, nesting_too_deep,
    duplicate_key or too_many_items."""
    # a quote that is left begins or ends a string, so every second piece lies outside of strings
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    check_count(plain.count(b'"') // 2, MAX_STRINGS, "strings")
    outside = b"".join(plain.split(b'"')[::2])
    check_count(outside.count(b","), MAX_ITEMS, "items")
    skeleton = outside.translate(ALL_SQUARE, NOT_BRACKETS)
    if skeleton.startswith(b"[" * (MAX_DEPTH + 1)):
        raise too_deep()
    check_count(skeleton.count(b"["), MAX_CONTAINERS, "objects and arrays")
    check_depth(skeleton)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise refusal(body, error) from None
    # a colon stands behind each key, so keys that were lost are missing from the count
    num_keys = outside.count(b":")
    if count_keys(value, num_keys) != num_keys:
        raise RequestError("an object has the same key twice", code="duplicate_key")
    return value


def check_count(count: int, most: int, what: str) -> None:
    if count > most:
        raise RequestError(
            f"the body holds {count} {what}, at most {most} are accepted", code="too_many_items"
        )


def check_depth(skeleton: bytes) -> None:
    """`skeleton`: the brackets outside of strings, all square."""
    for _ in range(MAX_DEPTH):
        inner = skeleton.replace(b"[]", b"")  # takes the innermost level away
        if len(inner) == len(skeleton):
            return  # nothing is left, or brackets that do not match: invalid JSON
        skeleton = inner
    if b"[]" in skeleton:
        raise too_deep()


def too_deep() -> RequestError:
    return RequestError(f"the body is nested deeper than {MAX_DEPTH} levels", code="nesting_too_deep")


def count_keys(value: Any, expected: int) -> int:
    """Keys of all objects in `value`. Raises RequestError for an object with more than MAX_KEYS."""
    if isinstance(value, dict) and len(value) == expected <= MAX_KEYS:
        return expected  # nothing inside has any
    total = 0
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            check_count(len(item), MAX_KEYS, "keys in one object")
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
