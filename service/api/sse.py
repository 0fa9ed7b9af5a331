"""How answers leave: one stream's events as steps bring them, or one body at the end.

front/generation --on_delta, on_end--> EventStream --ASGI send--> client
                                       Collector   --bytes------> routes

Steps append bytes and wake one writer; what has gathered while the writer was busy leaves in one write. A
hang-up is told by ASGI's `receive` and aborts the generation at once; nothing polls. A client that has
stopped reading is hung up on by front/http_protocol, and the same way tells it.
"""

import asyncio

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.answers import AnswerFormat
from service.api.errors import envelope
from service.errors import HalftoneError
from service.front.generation import Answer, Delta, Generation
from service.messages import TokenLogprobs

PING = b": ping\n\n"  # a comment: keeps proxies from closing a stream that waits for its first token
PING_INTERVAL_S = 15.0
MAX_WAITING_BYTES = 256 << 10  # for a client that reads slower than the engine writes

HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


class EventStream(Response):
    """A response that is still being made. `attach` comes before the generation starts.

    `send_body` is the server's own `send`. Its events come a hundred times a second and stream, and what the
    frameworks wrap around it looks at the start of a response only.
    """

    background = None
    status_code = 200

    def __init__(self, send_body: Send) -> None:
        # not Response's own: there is no body yet
        self._send_body = send_body
        self.raw_headers = list(HEADERS)
        self._waiting: list[bytes] = []
        self._num_waiting_bytes = 0
        self._ended = False
        self._wake: asyncio.Future[None] | None = None
        self._quiet = True  # nothing was sent since the last tick

    def attach(self, generation: Generation, format: AnswerFormat) -> None:
        self.generation = generation
        self.format = format

    def on_delta(self, answer: Answer, delta: Delta) -> None:
        events = self.format.events(answer, delta)
        if events:
            self._push(events)

    def on_end(self, error: HalftoneError | None) -> None:
        # no [DONE] behind an error: a client would take the answer for a whole one
        self._ended = True
        self._push(self.format.closing() if error is None else b"data: " + envelope(error) + b"\n\n")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        watch = asyncio.create_task(self._watch(receive))
        self._timer = loop.call_later(PING_INTERVAL_S, self._tick, loop)
        try:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            # a task of its own wakes without passing through a dozen frames of the frameworks
            await asyncio.create_task(self._write(loop))
        finally:
            self._timer.cancel()
            watch.cancel()
            self.generation.cancel()

    async def _write(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sends what gathers, to the end of the response."""
        send = self._send_body
        while self._waiting or not self._ended:
            if not self._waiting:
                self._wake = loop.create_future()
                await self._wake
                self._wake = None
                continue
            body = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
            self._waiting.clear()
            self._num_waiting_bytes = 0
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._quiet = False
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _watch(self, receive: Receive) -> None:
        await disconnected(receive)
        self.generation.cancel()
        self._ended = True
        self._waiting.clear()
        self._wake_writer()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._quiet and self._wake is not None:
            self._push(PING)
        self._quiet = True
        self._timer = loop.call_later(PING_INTERVAL_S, self._tick, loop)

    def _push(self, events: bytes) -> None:
        self._waiting.append(events)
        self._num_waiting_bytes += len(events)
        if self._num_waiting_bytes > MAX_WAITING_BYTES and not self._ended:
            self.generation.fail(
                HalftoneError("the client reads too slowly for this stream", code="client_too_slow")
            )
            return
        self._wake_writer()

    def _wake_writer(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Collector:
    """Gathers every answer until the generation ends."""

    def __init__(self) -> None:
        self._end: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._texts: dict[int, list[str]] = {}
        self._deltas: dict[int, Delta] = {}

    def attach(self, generation: Generation, format: AnswerFormat) -> None:
        self.generation = generation
        self.format = format

    def on_delta(self, answer: Answer, delta: Delta) -> None:
        whole = self._deltas.get(answer.index)
        if whole is None:
            self._texts[answer.index] = [delta.text]
            logprobs: list[TokenLogprobs] | None = None if delta.logprobs is None else list(delta.logprobs)
            self._deltas[answer.index] = Delta("", list(delta.token_ids), logprobs)
            return
        self._texts[answer.index].append(delta.text)
        whole.token_ids += delta.token_ids
        if delta.logprobs is not None:
            whole.logprobs = (whole.logprobs or []) + delta.logprobs

    def on_end(self, error: HalftoneError | None) -> None:
        if self._end.done():
            return
        if error is None:
            self._end.set_result(True)
        else:
            self._end.set_exception(error)

    async def body(self, receive: Receive) -> bytes | None:
        """-> the response, or None where the client hung up. Raises what the generation failed with."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            if not await self._end:
                return None
        finally:
            watch.cancel()
            self.generation.cancel()
        for index, whole in self._deltas.items():
            whole.text = "".join(self._texts[index])
        return self.format.body([self._deltas[answer.index] for answer in self.generation.answers])

    async def _watch(self, receive: Receive) -> None:
        await disconnected(receive)
        if not self._end.done():
            self._end.set_result(False)


async def disconnected(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
