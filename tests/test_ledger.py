"""The parts of the ledger are named once, explained, and grouped by what stands before the dot."""

import pytest

from service.ledger import PARTS, group_bytes, kv_bytes, kv_tokens_in, requests_in, weight_bytes


def test_parts_are_named_once_and_explained() -> None:
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert all(part.help.endswith(".") for part in PARTS)


@pytest.mark.parametrize(
    ("group", "expected"), [("weights", 11), ("kv", 700), ("tables", 5000), ("graphs", 90_000), ("we", 0)]
)
def test_groups_are_whole_words(group: str, expected: int) -> None:
    parts = {
        "weights.codes": 10, "weights.norms": 1, "kv.used": 300, "kv.free": 400, "tables.rotary": 5000,
        "graphs": 90_000,
    }  # fmt: skip
    assert group_bytes(parts, group) == expected
    assert (weight_bytes(parts), kv_bytes(parts)) == (11, 700)


def test_a_cache_is_held_by_whole_blocks() -> None:
    assert kv_tokens_in(1000.0, 10) == 96  # of 100
    assert kv_tokens_in(-1.0, 10) == 0
    assert requests_in(96, 32.0) == 3
    assert requests_in(96, 32.5) == 2  # a third block each
    assert requests_in(96, 97.0) == 0
