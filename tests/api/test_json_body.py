"""The JSON parser alone: what it takes for structure, and what it leaves alone as text."""

import json
from typing import Any

import orjson
import pytest

from service.api.json_body import MAX_DEPTH, parse_json
from service.errors import RequestError


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"b": [1, {"c": "d\\"}:{"}]}}',
        '{"a:b": "::", "c": [[], {}, {"d": 1}]}',
        "[1, 2.5e3, -0, true]",
        '""',
    ],
)
def test_valid_json_is_read(text: str) -> None:
    assert parse_json(text.encode()) == json.loads(text)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_is_exact(opening: str) -> None:
    closing = "]" if opening == "[" else "}"

    def nested(depth: int) -> bytes:
        return (opening * (depth - 1) + "[]" + closing * (depth - 1)).encode()

    assert parse_json(nested(MAX_DEPTH)) == orjson.loads(nested(MAX_DEPTH))
    with pytest.raises(RequestError, match="nested"):
        parse_json(nested(MAX_DEPTH + 1))
    assert parse_json(b"[[], " + nested(MAX_DEPTH - 1) + b"]")
    with pytest.raises(RequestError, match="nested"):
        parse_json(b"[[], " + nested(MAX_DEPTH) + b"]")


@pytest.mark.parametrize("keys", [("n",), ("stream_options", "include_usage")])
def test_brackets_and_colons_in_strings_are_text(keys: tuple[str, ...]) -> None:
    value: Any = '[[{{"x": ' * 50
    for key in reversed(keys):
        value = {key: value}
    assert parse_json(orjson.dumps(value)) == value
