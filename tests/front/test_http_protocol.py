"""Clients that keep a connection waiting are hung up on, and nobody else."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from service.front import http_protocol
from service.front.http_protocol import HEADER_TIMEOUT_S, STALL_TIMEOUT_S, HTTPProtocol
from service.front.http_server import HTTPServer

pytestmark = pytest.mark.anyio

KEEP_ALIVE_S = 75
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Application:
    """Answers `ok` when it is let go; `/flood` writes until the client is gone."""

    def __init__(self) -> None:
        self.released = asyncio.Event()
        self.flood_ended = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/flood":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            gone = asyncio.create_task(disconnected(receive))
            while not gone.done():
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await asyncio.sleep(0)
            self.flood_ended.set()
            return
        await self.released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


async def disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# --- one connection, on a clock that the test holds


@dataclass
class Timer:
    delay_s: float
    act: Callable[[], None]
    clock: "Clock"

    def cancel(self) -> None:
        self.clock.timers.remove(self)


class Clock:
    """The running event loop, but for its timers: they run when the test says so."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio.get_running_loop(), name)

    def call_later(self, delay_s: float, act: Callable[[], None]) -> Timer:
        self.timers.append(Timer(delay_s, act, self))
        return self.timers[-1]

    @property
    def delays_s(self) -> list[float]:
        return [timer.delay_s for timer in self.timers]


@dataclass
class Transport(asyncio.Transport):
    written: list[bytes] = field(default_factory=list)
    aborted: bool = False

    def write(self, data: Any) -> None:
        self.written.append(data)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.aborted

    def close(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


class Connection:
    def __init__(self) -> None:
        self.app = Application()
        self.clock = Clock()
        self.transport = Transport()
        config = uvicorn.Config(
            self.app, log_config=None, lifespan="off", ws="none", timeout_keep_alive=KEEP_ALIVE_S
        )
        self.protocol = HTTPProtocol(config, ServerState(), {}, self.clock)  # type: ignore[arg-type]
        self.protocol.connection_made(self.transport)

    async def answer(self) -> None:
        """Lets the application answer, and waits until it has."""
        self.app.released.set()
        await asyncio.gather(*self.protocol.tasks)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_headers_have_a_deadline_and_what_follows_them_has_not() -> None:
    connection = Connection()
    assert connection.clock.delays_s == [HEADER_TIMEOUT_S]
    for byte in REQUEST[:-1]:  # one at a time: none of them puts the end off
        connection.protocol.data_received(bytes([byte]))
        assert connection.clock.delays_s == [HEADER_TIMEOUT_S]
    connection.protocol.data_received(REQUEST[-1:])
    assert connection.clock.delays_s == []
    await connection.answer()
    assert b"".join(connection.transport.written).endswith(b"ok")
    assert connection.clock.delays_s == [KEEP_ALIVE_S]


@pytest.mark.parametrize("begun", [b"G", b"\r\n", REQUEST[:-1]])
async def test_the_next_request_of_a_connection_has_the_same_deadline(begun: bytes) -> None:
    connection = Connection()
    connection.protocol.data_received(REQUEST)
    await connection.answer()
    connection.protocol.data_received(begun)
    (deadline,) = connection.clock.timers
    assert deadline.delay_s == HEADER_TIMEOUT_S
    deadline.act()
    assert connection.transport.aborted


async def test_a_body_is_the_guards_to_bound() -> None:
    connection = Connection()
    connection.protocol.data_received(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nabc")
    connection.protocol.data_received(b"def")
    assert connection.clock.delays_s == []
    await connection.answer()


async def test_only_a_full_buffer_has_the_deadline_of_readers() -> None:
    connection = Connection()
    connection.protocol.data_received(REQUEST)
    for _ in range(2):
        connection.protocol.pause_writing()
        assert connection.clock.delays_s == [STALL_TIMEOUT_S]
        connection.protocol.resume_writing()
        assert connection.clock.delays_s == []
    connection.protocol.pause_writing()
    connection.clock.timers[0].act()
    assert connection.transport.aborted
    connection.protocol.resume_writing()
    await connection.answer()


async def test_a_lost_connection_leaves_no_timer() -> None:
    connection = Connection()
    connection.protocol.pause_writing()
    assert len(connection.clock.timers) == 2
    connection.protocol.connection_lost(None)
    assert connection.clock.timers == []


# --- the server, over real sockets and real but short deadlines


@contextlib.asynccontextmanager
async def serving(app: Application) -> AsyncIterator[tuple[str, int]]:
    """The address of a server as the host starts it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        server = HTTPServer(app, backlog=16)
        await server.start(listener)
        try:
            async with asyncio.timeout(30):
                yield listener.getsockname()
        finally:
            await server.stop()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: x\r\n"], ids=["nothing", "half"])
async def test_a_client_that_does_not_ask_is_hung_up_on(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(http_protocol, "HEADER_TIMEOUT_S", 0.01)
    async with serving(Application()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_does_not_read_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its response ends as by any other hang-up, and its buffer is let go."""
    monkeypatch.setattr(http_protocol, "STALL_TIMEOUT_S", 0.01)
    app = Application()
    async with serving(app) as address:
        with socket.create_connection(address) as client:
            client.sendall(b"GET /flood HTTP/1.1\r\nhost: x\r\n\r\n")
            await app.flood_ended.wait()
