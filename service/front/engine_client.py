"""The asyncio side of the engine's socket: requests go out, one Step message a step comes in.

api/ --open, abort, evaluate--> EngineClient --frames--> engine child
api/ <--sink(Output, time)----- EngineClient <--frames-- engine child

A client outlives its engines: the supervisor connects it to each new child and says when one is gone. Each
open request ends exactly once: by an Output with a finish reason, or by `abort`. All times are
`time.monotonic()` seconds. Everything runs on the event loop; nothing here waits while a step is handed out.
"""

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Literal

from service.errors import EngineUnavailableError, HalftoneError, OverloadedError
from service.front.connection import EngineConnection
from service.front.engine_state import EngineState, State
from service.messages import (
    ENGINE_DIED,
    INTERNAL_ERROR,
    Abort,
    EngineInfo,
    EngineMessage,
    Evaluate,
    Evaluated,
    Fatal,
    FinishReason,
    FrontMessage,
    Loading,
    Output,
    Ready,
    Sampling,
    Shutdown,
    Step,
    Submit,
    frame,
)
from service.metrics import Metrics

logger = logging.getLogger(__name__)

EvaluationMode = Literal["prefill", "decode1", "decode8"]
Sink = Callable[[Output, float], None]


class OpenRequest:
    """A request that has no end yet."""

    __slots__ = ("first_token_at", "last_token_at", "num_prompt_tokens", "num_tokens", "opened_at", "sink")

    def __init__(self, sink: Sink, opened_at: float, num_prompt_tokens: int) -> None:
        self.sink = sink
        self.num_prompt_tokens = num_prompt_tokens
        self.opened_at = opened_at
        self.first_token_at = 0.0
        self.last_token_at = 0.0
        self.num_tokens = 0


class EngineClient:
    """Streams of one engine at a time. Built once a front; see `Supervisor` for the engine's lives."""

    def __init__(self, max_queue_requests: int, metrics: Metrics, swap_wait_s: float = 30) -> None:
        self.engine_state = EngineState(metrics, max_queue_requests, swap_wait_s)
        self.info: EngineInfo | None = None
        self.loading: Loading | None = None
        self.fatal: Fatal | None = None  # of the present or the last engine
        self.last_message_at = time.monotonic()
        self.max_queue_requests = max_queue_requests
        metrics.queue_limit(max_queue_requests)
        self.said_ready = asyncio.Event()  # by the present engine; `connect` makes another for the next
        self.on_loading: Callable[[Loading], None] | None = None
        self._metrics = metrics
        self._next_id = 1
        self._open: dict[int, OpenRequest] = {}
        self._evaluations: dict[
            int, tuple[asyncio.Future[Evaluated], Callable[[Evaluated], None] | None]
        ] = {}
        self._connection: EngineConnection | None = None
        self._outbox: list[bytes] = []
        self._idle_waiters: list[asyncio.Future[None]] = []
        self.is_serving = False  # the present engine has said Ready

    @property
    def state(self) -> State:
        return self.engine_state.now

    @property
    def failure(self) -> HalftoneError | None:
        """Why the state is `failed`."""
        return self.engine_state.failure

    # --- for api/ ------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        """Requests that have no end yet."""
        return len(self._open)

    def admit(self, num_requests: int = 1) -> None:
        """Raises what `open` would raise for one of `num_requests` opened in this turn of the event loop.

        EngineUnavailableError when the engine takes no requests, OverloadedError when the queue is full.
        """
        if self.state != "ready":
            self._metrics.rejected(self.state)
            raise self.engine_state.unavailable()
        if len(self._open) + num_requests > self.max_queue_requests:
            self._metrics.rejected("overloaded")
            raise OverloadedError(
                f"{len(self._open)} of at most {self.max_queue_requests} requests are open, "
                f"no room for {num_requests} more",
                hint="try again in a moment, or start the server with a larger `max_queue_requests`",
            )

    def open(
        self,
        prompt: list[int],
        sampling: Sampling,
        salt: bytes,
        sink: Sink,
        *,
        arrived_at: float | None = None,
    ) -> int:
        """Starts a request -> its id. `sink` is called on the event loop once for each step that gives it
        something, with the Output and the step's arrival time; the last one has a finish reason. It must
        neither wait nor raise, and it may call `abort`.

        `arrived_at`: when the request reached the server, which time to first token counts from.
        Raises as `admit` does.
        """
        self.admit()
        id = self._next_id
        self._next_id = id + 1
        self._open[id] = OpenRequest(
            sink, time.monotonic() if arrived_at is None else arrived_at, len(prompt)
        )
        self._metrics.accepted()
        self._send(Submit(id, prompt, sampling, salt))
        return id

    def abort(self, id: int, finish_reason: FinishReason = "abort") -> None:
        """Ends a request from this side; its sink is not called again. Nothing happens if it has ended.

        `finish_reason` is what it counts as: `stop` when the front found a stop string.
        """
        request = self._open.pop(id, None)
        if request is not None:
            self._send(Abort([id]))
            self._ended(request, finish_reason, time.monotonic())
            self._wake_if_idle()

    async def evaluate(
        self,
        windows: list[list[int]],
        modes: Sequence[EvaluationMode],
        *,
        decode_tokens: int = 2048,
        reference: str = "",
        reference_path: str = "",
        scored_from: Sequence[int] = (),
        prompts: Sequence[list[int]] = (),
        greedy_tokens: int = 64,
        progress: Callable[[Evaluated], None] | None = None,
    ) -> Evaluated:
        """Quality of the served weights on `windows` of token ids; `progress` sees each message on the way.
        What each argument means stands with messages.Evaluate.

        Raises EngineUnavailableError when the engine is not ready or dies, HalftoneError with what it says
        when it cannot evaluate.
        """
        if self.state != "ready":
            raise self.engine_state.unavailable()
        id = self._next_id
        self._next_id = id + 1
        answer: asyncio.Future[Evaluated] = asyncio.get_running_loop().create_future()
        self._evaluations[id] = answer, progress
        beside = reference, reference_path, list(scored_from), list(prompts), greedy_tokens
        self._send(Evaluate(id, windows, list(modes), decode_tokens, *beside))
        try:
            evaluated = await answer
        finally:
            self._evaluations.pop(id, None)
        if evaluated.error:
            raise HalftoneError(evaluated.error, code="evaluation_failed")
        return evaluated

    async def wait_ready(self) -> EngineInfo:
        """Waits through loading and restarts -> what is served. Raises the reason once the state is `failed`,
        EngineUnavailableError when the server is shut down meanwhile."""
        if not self.engine_state.is_draining:
            await self.wait_for("ready", "failed", "draining")
        if self.failure is not None:
            raise self.failure
        if self.state != "ready" or self.info is None:
            raise self.engine_state.unavailable()
        return self.info

    async def wait_for(self, *states: State) -> None:
        """Returns when one of `states` has been entered, even if it was left at once."""
        await self.engine_state.wait_for(*states)

    # --- for the host --------------------------------------------------------------------------

    def drain(self) -> None:
        """Takes no more requests; those that are open go on."""
        self.engine_state.drain()

    async def wait_idle(self) -> None:
        """Returns when no request is open."""
        if self._open:
            idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(idle)
            try:
                await idle
            finally:
                if idle in self._idle_waiters:  # who gave up waiting
                    self._idle_waiters.remove(idle)

    def end_all(self, error: str) -> None:
        """Every open request ends now, with an error that says `error`."""
        if self._open:
            self._send(Abort(list(self._open)))
        self._end_open(error)

    # --- for the supervisor --------------------------------------------------------------------

    async def connect(self, connection: socket.socket) -> asyncio.Future[None]:
        """Takes over this side of a new engine's socket -> a future that is done when the engine hangs up."""
        self.loading = None
        self.fatal = None
        self._outbox.clear()
        self.said_ready = asyncio.Event()
        # both before the await: a quick engine is ready by the time it returns
        self.engine_state.enter("starting")
        connected = self._connection = EngineConnection(self.receive)
        await asyncio.get_running_loop().create_unix_connection(lambda: connected, sock=connection)
        return connected.closed

    def disconnect(self) -> None:
        """The engine is gone or is about to be killed: ends what it had promised. May be called twice."""
        connection, self._connection = self._connection, None
        self.is_serving = False
        if connection is not None:
            connection.transport.abort()
        self._outbox.clear()
        if self.state != "failed":
            self.engine_state.enter("down")
        self._end_open(ENGINE_DIED)
        for answer, _ in self._evaluations.values():
            if not answer.done():
                answer.set_exception(EngineUnavailableError(ENGINE_DIED))

    def fail(self, failure: HalftoneError) -> None:
        """There will be no other engine."""
        self.engine_state.fail(failure)

    def shut_down_engine(self) -> None:
        """Asks the engine to exit."""
        self._send(Shutdown())

    def receive(self, message: EngineMessage) -> None:
        """One message of the engine. Called by the protocol."""
        now = self.last_message_at = time.monotonic()
        if type(message) is Step:
            self._hand_out(message, now)
        elif isinstance(message, Evaluated):
            self._evaluated(message)
        elif isinstance(message, Loading):
            self.loading = message
            self._metrics.loading(message.stage, message.done, message.total, message.unit)
            if self.on_loading is not None:
                self.on_loading(message)
        elif isinstance(message, Ready):
            self.info = message.info
            self.loading = None
            self.is_serving = True
            self._metrics.engine_ready(message.info)
            self.engine_state.enter("ready")
            self.said_ready.set()
        elif isinstance(message, Fatal):
            self.fatal = message

    # --- inside --------------------------------------------------------------------------------

    def _hand_out(self, step: Step, now: float) -> None:
        metrics = self._metrics
        if step.stats.memory_bytes is not None and self.info is not None:
            self.info.memory_bytes = step.stats.memory_bytes
        open_requests = self._open
        # Streams that decode together share their last step: one observation stands for all of them.
        shared_last = 0.0
        num_shared = num_generated = num_discarded = 0
        for output in step.outputs:
            request = open_requests.get(output.id)
            num_new = len(output.token_ids)
            num_generated += num_new
            if request is None:
                num_discarded += num_new
                continue
            if num_new:
                request.num_tokens += num_new
                last = request.last_token_at
                if not last:
                    request.first_token_at = now
                    metrics.first_token(now - request.opened_at)
                elif num_new == 1 and last == shared_last:
                    num_shared += 1
                elif num_new == 1:
                    if num_shared:
                        metrics.inter_token(now - shared_last, num_shared)
                    shared_last, num_shared = last, 1
                else:
                    metrics.inter_token((now - last) / num_new, num_new)
                request.last_token_at = now
            if output.finish_reason is not None:
                del open_requests[output.id]
                self._ended(request, output.finish_reason, now, output.error)
            try:
                request.sink(output, now)
            except Exception:  # one stream's fault must not reach the others of this step
                logger.exception("request %d ends: its sink failed", output.id)
                self.abort(output.id, "error")
                self._end(request, output.id, INTERNAL_ERROR, now)
        if num_shared:
            metrics.inter_token(now - shared_last, num_shared)
        if num_generated:
            metrics.tokens("generated", num_generated)
        if num_discarded:
            metrics.tokens("discarded", num_discarded)
        metrics.step(step.stats)
        self._wake_if_idle()

    def _evaluated(self, message: Evaluated) -> None:
        answer, progress = self._evaluations.get(message.id, (None, None))
        if answer is None or answer.done():
            return
        if progress is not None:
            progress(message)
        if message.error or message.done >= message.total:
            if not message.error:
                self._metrics.evaluated(message)
            answer.set_result(message)

    def _ended(self, request: OpenRequest, reason: str, now: float, error: str = "") -> None:
        self._metrics.finished(
            reason,
            request.num_prompt_tokens,
            request.num_tokens,
            request.last_token_at - request.first_token_at,
            now - request.opened_at,
            error,
        )

    def _end_open(self, error: str) -> None:
        ended, self._open = self._open, {}
        now = time.monotonic()
        for id, request in ended.items():
            self._ended(request, "error", now, error)
            self._end(request, id, error, now)
        self._wake_if_idle()

    def _end(self, request: OpenRequest, id: int, error: str, now: float) -> None:
        """The one Output that says how a request failed."""
        try:
            request.sink(Output(id, [], "error", error=error), now)
        except Exception:
            logger.exception("request %d could not be told of its end", id)

    def _wake_if_idle(self) -> None:
        if self._idle_waiters and not self._open:
            waiters, self._idle_waiters = self._idle_waiters, []
            for idle in waiters:
                if not idle.done():
                    idle.set_result(None)

    def _send(self, message: FrontMessage) -> None:
        if self._connection is None:
            return  # the engine is gone, and with it whatever this message is about
        if not self._outbox:
            # what one turn of the event loop sends leaves in one write
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(frame(message))

    def _flush(self) -> None:
        if self._outbox and self._connection is not None:
            self._connection.transport.write(b"".join(self._outbox))
        self._outbox.clear()
