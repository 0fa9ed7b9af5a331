"""What the client makes of a stream: good ones, plain ones, broken ones."""

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from scripted_server import event, full_answer, refusal, sse, usage_of

from loadtest.client import Client, Recorder, brings_token
from loadtest.errors import LoadTestError
from loadtest.statistics import Record


def feed(timeline: list[tuple[float, Any]]) -> Record:
    """[(time, event)] -> the record of a request that was due at 1.0 and over at 9.0."""
    record = Record(0, scheduled_s=1.0)
    recorder = Recorder(record)
    for now_s, message in timeline:
        recorder.event(message if isinstance(message, bytes) else json.dumps(message).encode(), now_s)
    recorder.end(9.0)
    return record


def test_tokens_are_counted_by_the_server() -> None:
    """One chunk may carry several tokens, and the chat's first chunk carries none."""
    record = feed(
        [
            (1.1, event("", usage=0, chat=True)),
            (1.5, event("a", usage=1, chat=True)),
            (1.6, event("b", usage=2, chat=True)),
            (1.9, event("cd", usage=4, chat=True, finish="length")),
            (1.95, {"choices": [], "usage": usage_of(4, cached=3)}),
            (2.0, b"[DONE]"),
        ]
    )
    assert record.ok
    assert record.counted_by == "server"
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (7, 3, 4)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.e2e_s == pytest.approx(0.9)
    assert record.tpot_s == pytest.approx(0.4 / 3)
    assert record.gaps_s() == pytest.approx([0.1, 0.15, 0.15])


@pytest.mark.parametrize(("with_usage", "tokens", "counted_by"), [(True, 3, "usage"), (False, 2, "events")])
def test_a_chunk_is_an_event_and_usage_at_the_end_holds(
    with_usage: bool, tokens: int, counted_by: str
) -> None:
    timeline = [(1.5, event("a")), (1.6, event("bc")), (1.7, event("", finish="stop"))]
    if with_usage:
        timeline.append((1.7, {"choices": [], "usage": usage_of(3)}))
    record = feed(timeline)
    assert record.counted_by == counted_by
    assert record.output_tokens == tokens
    assert record.gaps_s() == pytest.approx([0.1])
    assert record.tpot_s == pytest.approx((0.7 - 0.5) / (tokens - 1))
    assert record.tokens_by(1.55) == tokens / 2


@pytest.mark.parametrize(
    ("timeline", "error"),
    [
        ([(1.5, event("a", usage=1))], "without a finish reason"),
        ([(1.5, event("a", usage=1)), (1.6, {"error": {"message": "engine died\nat x"}})], "engine died"),
        ([(1.5, event("", usage=0, finish="stop"))], "no token"),
        ([(1.5, b"{nonsense")], "not JSON"),
    ],
)
def test_what_ends_early_is_an_error(timeline: list[tuple[float, Any]], error: str) -> None:
    record = feed(timeline)
    assert error in record.error
    assert record.finished_s == (1.5 if record.finish_reason else 9.0)


Handle = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]


def send(handle: Handle, timeout_s: float = 60) -> Record:
    """One request to a server that handles a connection so."""

    connections: list[asyncio.Task[Any] | None] = []

    async def handle_whole(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        await handle(reader, writer)
        writer.close()
        await writer.wait_closed()

    async def exchange() -> Record:
        async with await asyncio.start_server(handle_whole, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            client = Client(f"http://127.0.0.1:{port}/v1", api_key="k", timeout_s=timeout_s)
            record = Record(0, asyncio.get_running_loop().time())
            await client.send(b"{}", record)
            await asyncio.gather(*filter(None, connections))
            return record

    return asyncio.run(exchange())


async def answer_in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte at a time, and the connection stays open behind `[DONE]`."""
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer k\r\n" in head
    for byte in full_answer({"max_tokens": 3, "stream_options": {}}).removesuffix(b"0\r\n\r\n"):
        writer.write(bytes([byte]))
        await writer.drain()
    await reader.read()


@pytest.mark.parametrize(
    ("choice", "counts"),
    [
        ({"text": "a", "finish_reason": None}, True),
        ({"text": "", "finish_reason": None}, True),  # half a character
        ({"text": "a", "finish_reason": "length"}, True),
        ({"text": "", "finish_reason": "stop"}, False),
        ({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, False),
        ({"delta": {"content": ""}, "finish_reason": None}, True),
        ({"delta": {"content": "a"}, "finish_reason": None}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
    ],
)
def test_which_events_stand_for_a_token(choice: dict[str, Any], counts: bool) -> None:
    assert brings_token(choice) is counts


def test_a_stream_torn_into_bytes_ends_at_done() -> None:
    record = send(answer_in_pieces)
    assert record.ok, record.error
    assert (record.output_tokens, len(record.arrivals), record.counted_by) == (3, 3, "usage")
    assert record.scheduled_s <= record.sent_s <= record.arrivals[0][0] <= record.finished_s


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (sse(event("a"))[:-40], "WireError: the connection was closed in the middle"),
        (refusal(503, "the engine is gone"), "HTTP 503: the engine is gone"),
        (b"HTTP/1.1 502 X\r\nContent-Length: 4\r\n\r\noops", "HTTP 502: oops"),
        (b"SSH-2.0-x\r\n\r\n", "WireError: `SSH-2.0-x` is not"),
        (b"", "WireError: the connection was closed"),
    ],
)
def test_a_broken_answer_is_an_error_of_its_request(raw: bytes, error: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(raw)

    assert send(handle).error.startswith(error)


def test_a_connection_that_is_reset_ends_its_request_at_once() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        linger = struct.pack("ii", 1, 0)  # closing sends a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    record = send(handle)
    assert record.error.startswith("ConnectionResetError")
    assert record.finished_s >= record.sent_s


def test_a_silent_server_is_given_up() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    assert send(handle, timeout_s=0.01).error == "no end of the answer within 0.01 s"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:b", "http://[::1"])
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(LoadTestError, match="--url") as caught:
        Client(url)
    assert url in caught.value.message
