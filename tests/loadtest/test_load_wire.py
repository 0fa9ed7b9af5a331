"""The answer's bytes, whole and torn at every place."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtest.wire import Answer, WireError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
EVENTS = [b'{"a":1}', b'{"b":"\xc3\xa9"}', b"[DONE]"]
BODY = b": ping\n\n" + b"".join(b"data: " + event + b"\n\n" for event in EVENTS)


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"


@settings(deadline=None)
@given(st.integers(1, len(BODY)), st.lists(st.integers(0, 400), max_size=12))
def test_events_survive_any_tearing(chunk_size: int, cuts: list[int]) -> None:
    raw = chunked(BODY, chunk_size)
    places = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    answer = Answer()
    seen = [event for a, b in pairwise(places) for event in answer.feed(raw[a:b])]
    assert seen == EVENTS
    assert answer.status == 200
    assert answer.complete


def test_events_with_carriage_returns() -> None:
    answer = Answer()
    assert answer.feed(HEAD + b"\r\n" + b"data: 1\r\n\r\ndata: 2\r") == [b"1"]
    assert answer.feed(b"\n\r\n") == [b"2"]
    answer.end()
    assert answer.complete


def test_an_event_of_two_lines_torn_between_them() -> None:
    """The second line alone looks like a whole event."""
    answer = Answer()
    assert answer.feed(HEAD + b"\r\ndata: 1\n") == []
    assert answer.feed(b"data: 2\n\n") == [b"1\n2"]


def test_a_body_with_a_length_is_kept_whole() -> None:
    answer = Answer()
    raw = b'HTTP/1.1 400 Bad Request\r\nContent-Length: 9\r\n\r\n{"e":"x"}'
    assert answer.feed(raw) == []
    assert (answer.status, bytes(answer.body), answer.complete) == (400, b'{"e":"x"}', True)


@pytest.mark.parametrize(
    "raw", [b"", chunked(BODY, 7)[:-12], b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"]
)
def test_a_cut_answer_is_an_error(raw: bytes) -> None:
    answer = Answer()
    answer.feed(raw)
    with pytest.raises(WireError, match="middle"):
        answer.end()


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"SSH-2.0-x\r\n\r\n", "status line"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", "hexadecimal"),
        (b"H" * 70000, "no end of headers"),
    ],
)
def test_what_is_not_http_is_an_error(raw: bytes, match: str) -> None:
    with pytest.raises(WireError, match=match):
        Answer().feed(raw)
