"""One stream's writer over a scripted connection: coalescing, pings, slow readers, hang-ups."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from service.api import sse
from service.api.sse import EventStream
from service.errors import EngineUnavailableError, HalftoneError
from service.front.generation import Answer, Delta

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class ScriptedGeneration:
    stream: EventStream
    cancelled: int = 0
    failed: bool = False

    def cancel(self) -> None:
        self.cancelled += 1

    def fail(self, error: HalftoneError) -> None:
        self.failed = True
        self.stream.on_end(error)


class PlainFormat:
    """Text as it stands."""

    def events(self, answer: Answer, delta: Delta) -> bytes:
        return delta.text.encode()

    def closing(self) -> bytes:
        return b"[DONE]"


@dataclass
class Connection:
    """A client that reads when it is let."""

    bodies: list[bytes] = field(default_factory=list)
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    starts: list[Any] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self) -> None:
        self.stream = EventStream(self.send_body)
        self.generation = ScriptedGeneration(self.stream)
        self.stream.attach(self.generation, PlainFormat())  # type: ignore[arg-type]
        self.reading.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send_body(self, message: Any) -> None:
        """The server's own."""
        await self.reading.wait()
        assert message["type"] == "http.response.body"
        self.bodies.append(message["body"])
        self.complete = not message["more_body"]

    async def send(self, message: Any) -> None:
        """What the frameworks have wrapped around it: the start passes through all of them."""
        assert not self.bodies
        self.starts.append(message)

    def open(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.stream({"type": "http"}, self.receive, self.send))

    def say(self, text: str) -> None:
        self.stream.on_delta(None, Delta(text, [], None))  # type: ignore[arg-type]


async def turns(count: int = 5) -> None:
    """Lets everything that is ready run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_what_gathers_while_the_writer_is_busy_leaves_in_one_write() -> None:
    connection = Connection()
    writer = connection.open()
    await turns()
    connection.say("a")
    await turns()
    connection.reading.clear()
    connection.say("b")
    await turns()
    connection.say("c")
    connection.say("d")
    connection.reading.set()
    await turns()
    connection.stream.on_end(None)
    await writer
    assert connection.bodies == [b"a", b"b", b"cd", b"[DONE]", b""]
    assert connection.complete
    assert [start["type"] for start in connection.starts] == ["http.response.start"]


async def test_an_error_is_the_last_event_and_not_followed_by_done() -> None:
    connection = Connection()
    writer = connection.open()
    connection.say("a")
    connection.stream.on_end(EngineUnavailableError("the engine died"))
    await writer
    text = b"".join(connection.bodies)
    assert text.startswith(b'adata: {"error":{"message":"the engine died"')
    assert text.endswith(b"}\n\n")
    assert b"[DONE]" not in text


async def test_a_hang_up_cancels_the_generation_and_ends_the_writer() -> None:
    connection = Connection()
    writer = connection.open()
    await turns()
    connection.reading.clear()
    connection.say("on its way")
    await turns()
    connection.gone.set()
    await turns()
    assert connection.generation.cancelled, "at once, though the writer still waits for the server"
    connection.reading.set()
    await writer
    connection.say("late")
    assert b"late" not in b"".join(connection.bodies)


async def test_a_silent_stream_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_INTERVAL_S", 0.001)
    connection = Connection()
    writer = connection.open()
    while len(connection.bodies) < 3:
        await asyncio.sleep(0)
    connection.stream.on_end(None)
    await writer
    assert set(connection.bodies[:3]) == {sse.PING}


async def test_a_server_that_ends_takes_its_streams_along() -> None:
    """Uvicorn cancels the request's task, in whichever of the two the stream waits."""
    connection = Connection()
    writer = connection.open()
    await turns()
    connection.reading.clear()
    connection.say("a")
    await turns()
    writer.cancel()
    await asyncio.wait({writer})
    assert writer.cancelled()
    assert connection.generation.cancelled
    connection.reading.set()
    await turns()
    assert not connection.bodies


async def test_what_the_writer_meets_reaches_the_server() -> None:
    connection = Connection()

    async def broken(message: Any) -> None:
        raise RuntimeError("planted")

    connection.stream = EventStream(broken)
    connection.generation = ScriptedGeneration(connection.stream)
    connection.stream.attach(connection.generation, PlainFormat())  # type: ignore[arg-type]
    writer = connection.open()
    connection.say("a")
    with pytest.raises(RuntimeError, match="planted"):
        await writer
    assert connection.generation.cancelled


async def test_a_slow_reader_holds_a_bounded_buffer() -> None:
    connection = Connection()
    writer = connection.open()
    await turns()
    connection.reading.clear()
    while not connection.generation.failed:
        connection.say("x" * 1000)
    connection.reading.set()
    await writer
    text = b"".join(connection.bodies)
    assert len(text) < sse.MAX_WAITING_BYTES + 2000
    assert text.rstrip().endswith(b'"code":"client_too_slow"}}')
