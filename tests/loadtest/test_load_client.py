"""The client against servers that follow a script: good ones, plain ones, broken ones."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from loadtest.__main__ import lines, main
from loadtest.client import Recorder
from loadtest.statistics import Record

Reply = Callable[[dict[str, Any]], bytes]


def event(
    text: str = "", *, usage: int | None = None, finish: str | None = None, chat: bool = False
) -> dict[str, Any]:
    body = {"delta": {"content": text}} if chat else {"text": text}
    chunk: dict[str, Any] = {"choices": [{"index": 0, **body, "finish_reason": finish}]}
    if usage is not None:
        chunk["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return chunk


def feed(timeline: list[tuple[float, Any]]) -> Record:
    """[(time, event)] -> the record of a request that was due at 1.0."""
    record = Record(0, scheduled_s=1.0)
    recorder = Recorder(record)
    for now_s, message in timeline:
        recorder.event(message if isinstance(message, bytes) else json.dumps(message).encode(), now_s)
    recorder.end()
    return record


def test_tokens_are_counted_by_the_server() -> None:
    """One chunk may carry several tokens, and the chat's first chunk carries none."""
    record = feed(
        [
            (1.1, event("", usage=0, chat=True)),
            (1.5, event("a", usage=1, chat=True)),
            (1.6, event("b", usage=2, chat=True)),
            (1.9, event("cd", usage=4, chat=True, finish="length")),
            (1.95, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}}),
            (2.0, b"[DONE]"),
        ]
    )
    assert record.ok
    assert record.counted_by == "server"
    assert (record.prompt_tokens, record.output_tokens) == (7, 4)
    assert record.ttft_s == pytest.approx(0.5)
    assert record.e2e_s == pytest.approx(0.9)
    assert record.tpot_s == pytest.approx(0.4 / 3)
    assert record.gaps_s() == pytest.approx([0.1, 0.15, 0.15])


def test_without_counts_a_chunk_is_a_token_and_usage_at_the_end_holds() -> None:
    record = feed(
        [
            (1.5, event("a")),
            (1.6, event("bc")),
            (1.7, event("", finish="stop")),
            (1.7, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}),
        ]
    )
    assert record.counted_by == "chunks"
    assert record.output_tokens == 3
    assert record.gaps_s() == pytest.approx([0.1])
    assert record.tpot_s == pytest.approx((0.7 - 0.5) / 2)


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
    assert error in feed(timeline).error


def sse(*events: dict[str, Any]) -> bytes:
    body = b"".join(b"data: " + json.dumps(item).encode() + b"\n\n" for item in events) + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


def refusal(status: int, message: str) -> bytes:
    body = json.dumps({"error": {"message": message}}).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def full_answer(request: dict[str, Any]) -> bytes:
    """What a server with every extension says."""
    count = request["max_tokens"]
    return sse(
        *(
            event(f"t{n}", usage=n, finish="length" if n == count else None, chat="messages" in request)
            for n in range(1, count + 1)
        )
    )


def plain_answer(request: dict[str, Any]) -> bytes:
    """A server that knows OpenAI's own fields only."""
    if "ignore_eos" in request or "continuous_usage_stats" in request["stream_options"]:
        return refusal(400, "unknown field")
    return sse(event("a"), event("b", finish="stop"))


def run_against(reply: Reply, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Run the command against a server on a free port -> exit status, what it wrote."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().split("content-length:")[1].split()[0])
        request = json.loads(await reader.readexactly(length))
        request["path"] = head.split()[1]
        writer.write(reply(request))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def serve(work: Callable[[int], Awaitable[int]]) -> int:
        async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
            return await work(server.sockets[0].getsockname()[1])

    async def command(port: int) -> int:
        arguments = ["--url", f"http://127.0.0.1:{port}", "--model", "m", "--json", str(out), *flags]
        return await asyncio.to_thread(main, arguments)

    status = asyncio.run(serve(command))
    return status, json.loads(out.read_bytes()) if out.exists() else {}


@pytest.mark.parametrize("arrivals", [["--concurrency", "3"], ["--rate", "2000"]])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_command_end_to_end(tmp_path: Path, arrivals: list[str], endpoint: str) -> None:
    flags = [*arrivals, "--requests", "6", "--warmup", "2", "--output-tokens", "5", "--endpoint", endpoint]
    status, result = run_against(full_answer, tmp_path / "out.json", *flags)
    assert status == 0
    assert result["features"] == {"ignore_eos": True, "continuous_usage": True}
    assert result["summary"]["num_ok"] == 6
    assert result["summary"]["output_tokens"] == 30
    assert result["summary"]["counted_by"] == ["server"]
    assert len(result["requests"]) == 8
    assert result["client"]["cpu_share"] >= 0
    assert min(record["scheduled_s"] for record in result["requests"]) == 0
    assert "output tokens/s" in "\n".join(lines(result))


def test_a_plain_server_is_measured_and_what_it_lacks_is_said(tmp_path: Path) -> None:
    flags = ["--concurrency", "1", "--requests", "2", "--warmup", "0", "--output-tokens", "5"]
    status, result = run_against(plain_answer, tmp_path / "out.json", *flags)
    assert status == 0
    assert result["features"] == {"ignore_eos": False, "continuous_usage": False}
    assert result["summary"]["num_short"] == 2
    said = "\n".join(lines(result))
    assert "gap between chunks" in said
    assert "ignore_eos" in said


def test_errors_are_counted_shown_and_fail_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def sometimes(request: dict[str, Any]) -> bytes:
        seen.append(request)
        if len(seen) in (3, 5):
            return refusal(503, "the engine is gone")
        return full_answer(request)[:-40] if len(seen) == 4 else full_answer(request)

    flags = ["--concurrency", "1", "--requests", "5", "--warmup", "1", "--output-tokens", "5"]
    status, result = run_against(sometimes, tmp_path / "out.json", *flags)
    assert status == 3
    assert result["summary"]["num_errors"] == 3
    assert result["summary"]["errors"]["HTTP 503: the engine is gone"] == 2
    assert any("middle of the answer" in error for error in result["summary"]["errors"])
    assert "2 x HTTP 503: the engine is gone" in capsys.readouterr().out


def test_a_server_that_never_answers_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = run_against(lambda _: refusal(401, "no such key"), tmp_path / "o", "--concurrency", "1")
    assert status == 2
    assert capsys.readouterr().err == "loadtest: HTTP 401: no such key\n"


def test_keys_and_paths_are_sent(tmp_path: Path) -> None:
    paths = []

    def reply(request: dict[str, Any]) -> bytes:
        paths.append(request["path"])
        return full_answer(request)

    run_against(reply, tmp_path / "o", "--concurrency", "1", "--requests", "1", "--endpoint", "chat")
    assert set(paths) == {"/v1/chat/completions"}
