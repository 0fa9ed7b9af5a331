"""One request over one socket: bytes out, a Record back.

drive --Client.send(body, record)--> server, and Answer's events --Recorder--> Record

Each request opens its own connection, so connecting is part of what it waits for. Anything that ends a
request early is written into its record as an error; nothing is retried and nothing is dropped.
"""

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadtest.statistics import Record
from loadtest.wire import Answer, WireError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
READ_BYTES = 65536


class Recorder:
    """Events of one stream, each with its time, -> the fields of a Record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.done = False
        self._tokens = 0
        self._chunks = 0

    def event(self, data: bytes, now_s: float) -> None:
        """One `data:` payload that arrived at `now_s`."""
        if data == b"[DONE]":
            self.done = True
            return
        try:
            message = orjson.loads(data)
        except orjson.JSONDecodeError:
            self.record.error = self.record.error or "an event is not JSON"
            return
        if error := message.get("error"):
            self.record.error = self.record.error or error_text(error)
            return
        usage = message.get("usage")
        if usage:
            self.record.prompt_tokens = usage.get("prompt_tokens", 0)
            self.record.output_tokens = usage.get("completion_tokens", 0)
        for choice in message.get("choices", ()):
            self._choice(choice, usage, now_s)

    def _choice(self, choice: dict[str, Any], usage: dict[str, Any] | None, now_s: float) -> None:
        if usage:
            self.record.counted_by = "server"
            tokens = usage.get("completion_tokens", 0)
        else:
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            self._chunks += bool(text)
            tokens = self._chunks
        if tokens > self._tokens:
            self._tokens = tokens
            self.record.arrivals.append((now_s, tokens))
        if choice.get("finish_reason"):
            self.record.finish_reason = choice["finish_reason"]
            self.record.finished_s = now_s

    def end(self) -> None:
        """The stream is over: a request without a finish reason or without a token is an error."""
        record = self.record
        if record.error:
            return
        if not record.finish_reason:
            record.error = "the stream ended without a finish reason"
        elif not record.arrivals:
            record.error = "no token came"
        elif not record.output_tokens:
            record.output_tokens = self._tokens


def error_text(error: Any) -> str:
    """OpenAI's error object, or whatever stands in its place -> one short line."""
    text = error.get("message", "") if isinstance(error, dict) else str(error)
    return (text or "error without a message").splitlines()[0][:200]


def body_error(answer: Answer) -> str:
    """A non-streamed answer -> one line with its status."""
    try:
        parsed = orjson.loads(bytes(answer.body))
        text = error_text(parsed.get("error", parsed))
    except (orjson.JSONDecodeError, AttributeError):
        text = bytes(answer.body[:120]).decode("utf-8", "replace")
    return f"HTTP {answer.status}: {text}"


@dataclass(frozen=True)
class Client:
    """Where requests go. `url` is the server's root, with or without `/v1`."""

    url: str
    endpoint: str
    api_key: str = ""
    timeout_s: float = 600.0

    async def send(self, body: bytes, record: Record) -> int:
        """Fill `record` from one streamed answer; -> HTTP status, 0 where none came."""
        loop = asyncio.get_running_loop()
        answer, recorder = Answer(), Recorder(record)
        record.sent_s = loop.time()
        try:
            async with asyncio.timeout(self.timeout_s):
                reader, writer = await self._connect()
                try:
                    writer.write(self._head(len(body)) + body)
                    while not answer.complete and not recorder.done:
                        data = await reader.read(READ_BYTES)
                        now_s = loop.time()
                        if not data:
                            answer.end()
                        for event in answer.feed(data):
                            recorder.event(event, now_s)
                finally:
                    writer.close()
        except TimeoutError:
            record.error = f"no end of the answer within {self.timeout_s:g} s"
        except (OSError, WireError) as error:
            record.error = record.error or f"{type(error).__name__}: {error}"
        if answer.status and not answer.event_stream and not record.error:
            record.error = body_error(answer)
        recorder.end()
        return answer.status

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self.url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        context = ssl.create_default_context() if secure else None
        return await asyncio.open_connection(parts.hostname, port, ssl=context)

    def _head(self, num_bytes: int) -> bytes:
        parts = urlsplit(self.url)
        path = parts.path.rstrip("/").removesuffix("/v1") + PATHS[self.endpoint]
        lines = [
            f"POST {path} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {num_bytes}",
            "Accept: text/event-stream",
            "Connection: close",
        ]
        if self.api_key:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")
