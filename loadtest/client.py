"""One request over one socket: bytes out, a Record back.

drive --Client.send(body, record)--> server, and Exchange's events --Recorder--> Record

Each request opens its own connection, so connecting is part of what it waits for. Anything that ends a
request early is written into its record as an error; nothing is retried and nothing is dropped.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import orjson

from loadtest.errors import LoadTestError
from loadtest.statistics import Record
from loadtest.wire import Answer, WireError

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
READ_BYTES = 65536
NO_TOKEN = "no token came"


class Recorder:
    """Events of one stream, each with its time, -> the fields of a Record."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.done = False
        self._tokens = 0

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
            self._usage(usage)
        for choice in message.get("choices", ()):
            if usage:  # this server counts each event
                self.record.counted_by = "server"
                tokens = usage.get("completion_tokens", 0)
            else:
                tokens = self._tokens + brings_token(choice)
            if tokens > self._tokens:
                self._tokens = tokens
                self.record.arrivals.append((now_s, tokens))
            if choice.get("finish_reason"):
                self.record.finish_reason = choice["finish_reason"]
                self.record.finished_s = now_s

    def _usage(self, usage: dict[str, Any]) -> None:
        record = self.record
        record.prompt_tokens = usage.get("prompt_tokens", 0)
        record.output_tokens = usage.get("completion_tokens", 0)
        record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if record.counted_by == "events":
            record.counted_by = "usage"

    def end(self, now_s: float) -> None:
        """The stream is over: a request without a finish reason or without a token is an error."""
        record = self.record
        if not record.error:
            if not record.finish_reason:
                record.error = "the stream ended without a finish reason"
            elif not record.arrivals:
                record.error = NO_TOKEN
            elif not record.output_tokens:
                record.output_tokens = self._tokens
        if not record.finish_reason:
            record.finished_s = now_s


def brings_token(choice: dict[str, Any]) -> bool:
    """Whether an event's choice stands for a token: it has text, or empty text before the end.

    Servers send empty text for a token inside a character; a chat's opening names a role, and is no token.
    """
    delta = choice.get("delta") or {}
    text = choice.get("text", delta.get("content"))
    return bool(text) or (text == "" and "role" not in delta and choice.get("finish_reason") is None)


def error_text(error: Any) -> str:
    """OpenAI's error object, or whatever stands in its place -> one short line."""
    text = error.get("message", "") if isinstance(error, dict) else str(error)
    return (str(text) or "error without a message").splitlines()[0][:200]


def body_error(status: int, body: bytes) -> str:
    """A non-streamed answer -> one line with its status."""
    try:
        parsed = orjson.loads(body)
        text = error_text(parsed.get("error", parsed))
    except (orjson.JSONDecodeError, AttributeError):
        text = body[:120].decode("utf-8", "replace")
    return f"HTTP {status}: {text}"


class Exchange(asyncio.BufferedProtocol):
    """One connection: writes the request, hands each event on with its time, and ends.

    A BufferedProtocol reads into one buffer that all connections of a client share; any other has asyncio
    allocate a quarter of a megabyte for every read, which costs more than all else here together.
    """

    def __init__(
        self,
        request: bytes,
        buffer: memoryview,
        clock: Callable[[], float],
        recorder: Recorder | None,
    ) -> None:
        self.answer = Answer()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request, self._buffer, self._clock, self._recorder = request, buffer, clock, recorder

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        if self._recorder is not None:
            self._recorder.record.connected_s = self._clock()
        transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        now_s = self._clock()
        try:
            events = self.answer.feed(bytes(self._buffer[:nbytes]))
        except WireError as error:
            self._end(error)
            return
        if self._recorder is not None:
            for event in events:
                self._recorder.event(event, now_s)
        if self.answer.complete or (self._recorder is not None and self._recorder.done):
            self._end()

    def eof_received(self) -> None:
        try:
            self.answer.end()
        except WireError as error:
            self._end(error)
        else:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or WireError("the connection was closed in the middle of the answer"))

    def _end(self, error: Exception | None = None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


class Client:
    """Where requests go. `url` is the server's root, with or without `/v1`; else LoadTestError."""

    def __init__(
        self, url: str, endpoint: str = "completions", api_key: str = "", timeout_s: float = 600.0
    ) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise LoadTestError(f"`--url` {url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LoadTestError(
                f"`--url` {url} is not the address of a server", hint="such as http://127.0.0.1:8000"
            )
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._host = parts.hostname
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._address = (self._host, port or (443 if self._ssl else 80))
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        lines = [f"Host: {parts.netloc.rpartition('@')[2]}", "Connection: close"]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        self._headers = "".join(f"{line}\r\n" for line in lines)
        self._buffer = memoryview(bytearray(READ_BYTES))

    async def locate(self) -> None:
        """Look the name up once, and keep the address that takes connections. Raises OSError."""
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, *self._address)
        self._address = transport.get_extra_info("peername")[:2]
        transport.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """-> status and body. Raises OSError, TimeoutError and WireError."""
        request = f"GET {self._root}{path} HTTP/1.1\r\n{self._headers}\r\n".encode("latin-1")
        async with asyncio.timeout(self._timeout_s):
            async with self._exchange(request, None) as exchange:
                await exchange.ended
        return exchange.answer.status, bytes(exchange.answer.body)

    async def send(self, body: bytes, record: Record) -> int:
        """Fill `record` from one streamed answer; -> HTTP status, 0 where none came."""
        loop = asyncio.get_running_loop()
        recorder = Recorder(record)
        head = (
            f"POST {self._root}{PATHS[self.endpoint]} HTTP/1.1\r\n{self._headers}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        answer: Answer | None = None
        record.sent_s = loop.time()
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._exchange(head.encode("latin-1") + body, recorder) as exchange:
                    answer = exchange.answer
                    await exchange.ended
        except TimeoutError:
            record.error = record.error or f"no end of the answer within {self._timeout_s:g} s"
        except (OSError, WireError) as error:
            record.error = record.error or f"{type(error).__name__}: {error}"
        if answer is not None and answer.status and not answer.event_stream and not record.error:
            record.error = body_error(answer.status, bytes(answer.body))
        recorder.end(loop.time())
        return answer.status if answer is not None else 0

    @contextlib.asynccontextmanager
    async def _exchange(self, request: bytes, recorder: Recorder | None) -> AsyncIterator[Exchange]:
        loop = asyncio.get_running_loop()
        exchange = Exchange(request, self._buffer, loop.time, recorder)
        transport, _ = await loop.create_connection(
            lambda: exchange,
            *self._address,
            ssl=self._ssl,
            server_hostname=self._host if self._ssl else None,
        )
        try:
            yield exchange
        finally:
            transport.close()
