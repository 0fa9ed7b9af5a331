"""The engine's lives: spawns the child, listens for its heartbeat, starts another when it dies.

settings --> Supervisor --socket pair, process--> engine child
swap     --replace--'└── says to EngineClient: connected, gone, failed for good

All times are monotonic: a jump of the wall clock restarts nothing.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from service.cores import physical_cores
from service.errors import EngineUnavailableError, HalftoneError, ShortageError, SystemProblem
from service.front.engine_client import EngineClient
from service.messages import SHUTTING_DOWN, EngineConfig, EngineInfo, Fatal
from service.metrics import Metrics

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "service.engine.child")
MAX_CRASHES = 5
CRASH_WINDOW_S = 600.0
FIRST_BACKOFF_S = 0.25  # doubled with each crash in the window
EXIT_GRACE_S = 5.0  # between Shutdown and SIGTERM, and again before SIGKILL


class Replacement:
    """An engine that is to take the place of the present one, and how that went."""

    def __init__(self, config: EngineConfig, on_failure: Callable[[HalftoneError], None]) -> None:
        self.config = config
        self.failure: HalftoneError | None = None
        self.outcome: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()
        self._on_failure = on_failure

    def fail(self, failure: HalftoneError) -> None:
        """It does not become ready: what served before is started again."""
        logger.error("the engine in `%s` is given up: %s", self.config.precision, failure)
        self.failure = failure
        self._on_failure(failure)

    def end(self, info: EngineInfo | None) -> None:
        """An engine serves again, or none will (`info` None)."""
        if self.outcome.done():
            return  # who asked has gone
        if self.failure is not None:
            self.outcome.set_exception(self.failure)
        elif info is None:
            self.outcome.set_exception(EngineUnavailableError(f"the {SHUTTING_DOWN}"))
        else:
            self.outcome.set_result(info)


class Supervisor:
    """Keeps one engine running. `start` once, `stop` once; in between look at `client.state`."""

    def __init__(
        self,
        config: EngineConfig,
        client: EngineClient,
        metrics: Metrics,
        *,
        load_timeout_s: float,
        step_timeout_s: float,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self.config = config
        self.client = client
        self.metrics = metrics
        self.load_timeout_s = load_timeout_s
        self.step_timeout_s = step_timeout_s
        self.command = command
        self.process: asyncio.subprocess.Process | None = None
        self._crashes: deque[float] = deque()
        self._was_ready = False
        self._stop_asked = False
        self._end_asked = asyncio.Event()  # of the present engine: to stop, or to make room
        self._next: Replacement | None = None  # asked for, not begun
        self._trial: Replacement | None = None  # begun; ends when an engine serves
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the first life; `client.wait_ready` says how it went."""
        self._task = asyncio.create_task(self._live(), name="engine supervisor")

    async def stop(self) -> None:
        """Ends the engine and waits until its process is gone. Open requests end with an error."""
        self.client.drain()
        self._stop_asked = True
        self._end_asked.set()
        if self._task is not None:
            await self._task

    async def replace(self, config: EngineConfig, on_failure: Callable[[HalftoneError], None]) -> EngineInfo:
        """Ends the present engine, whatever it has open, and starts one with `config` -> what it serves.

        Where that does not become ready, `on_failure` is told why, one with the configuration before is
        started, and the reason is raised as soon as it serves, or cannot either (`client.failure`). One call
        at a time.
        """
        assert self._next is None
        assert self._trial is None
        if self._task is None or self._task.done():
            raise self.client.engine_state.unavailable()
        replacement = self._next = Replacement(config, on_failure)
        self._end_asked.set()
        return await replacement.outcome

    # --- inside --------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            while not self._stop_asked and self.client.failure is None:
                if self._next is not None:
                    self._trial, self._next = self._next, None
                    self._end_asked.clear()
                tried = self._trial if self._is_trying else None
                reason = await self._one_life((tried or self).config)
                if tried is not None and tried is self._trial:  # it never served
                    if not self._stop_asked and tried.failure is None:
                        tried.fail(
                            EngineUnavailableError(f"the engine in `{tried.config.precision}`: {reason}")
                        )
                elif not self._end_asked.is_set() and self.client.failure is None:
                    await self._crashed(reason)
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self.client.fail(HalftoneError(f"the engine cannot be started: {error}"))
        finally:
            for replacement in (self._next, self._trial):
                if replacement is not None:
                    replacement.end(None)

    @property
    def _is_trying(self) -> bool:
        """Is the present engine to show that it can serve, with another one to go back to?"""
        return self._trial is not None and self._trial.failure is None

    async def _one_life(self, config: EngineConfig) -> str:
        """Spawns an engine and returns, once its process is gone, why it is."""
        front_socket, engine_socket = socket.socketpair()
        try:
            process = self.process = await self._spawn(engine_socket, config)
        except OSError as error:
            front_socket.close()
            self._fail(
                SystemProblem(f"the engine's program `{self.command[0]}` cannot be run: {error.strerror}")
            )
            return "not started"
        finally:
            engine_socket.close()
        logger.info("engine started, process %d", process.pid)
        reason, grace_s = "", 0.0
        try:
            hung_up = await self.client.connect(front_socket)
            reason = await self._watch(process, hung_up)
            if self._end_asked.is_set():
                await self._ask_to_exit(process)
            elif hung_up.done():
                grace_s = 1.0  # it ends by itself: time to write its last words and to set its exit code
        finally:
            self.client.disconnect()
            exit_code = await self._end_process(process, grace_s)
        reason = reason or describe_exit(exit_code)
        logger.log(
            logging.INFO if self._end_asked.is_set() else logging.ERROR,
            "engine process %d is gone: %s",
            process.pid,
            reason,
        )
        return reason

    async def _spawn(self, engine_socket: socket.socket, config: EngineConfig) -> asyncio.subprocess.Process:
        fd = engine_socket.fileno()
        return await asyncio.create_subprocess_exec(
            *self.command,
            *("--fd", str(fd)),
            *("--config", msgspec.json.encode(config).decode()),
            pass_fds=(fd,),
            stdin=asyncio.subprocess.DEVNULL,
            env=engine_environment(config.threads),
            start_new_session=True,  # ctrl-C is for the front, which drains before it ends the engine
        )

    async def _watch(self, process: asyncio.subprocess.Process, hung_up: asyncio.Future[None]) -> str:
        """Waits for the engine's end -> why it has to end; empty: it ended by itself."""
        started_at = time.monotonic()
        exited = asyncio.create_task(process.wait())
        end_asked = asyncio.create_task(self._end_asked.wait())
        ready = asyncio.create_task(self.client.said_ready.wait())
        events: list[asyncio.Future[Any]] = [exited, hung_up, end_asked, ready]
        try:
            while not (exited.done() or hung_up.done() or end_asked.done()):
                if ready.done():
                    if ready in events:
                        events.remove(ready)
                        self._serves()
                    limit_s, since = self.step_timeout_s, self.client.last_message_at
                else:
                    limit_s, since = self.load_timeout_s, started_at
                rest_s = since + limit_s - time.monotonic()
                if rest_s > 0:
                    await asyncio.wait(events, timeout=rest_s, return_when=asyncio.FIRST_COMPLETED)
                elif ready.done():
                    return f"no sign of life for {limit_s:g} s (`step_timeout_s`)"
                else:
                    return self._load_timed_out()
            if exited.done() and not hung_up.done():  # its last message may still be in the socket
                await asyncio.wait({hung_up}, timeout=1.0)
            return self._last_words()
        finally:
            for task in (exited, end_asked, ready):
                task.cancel()

    def _serves(self) -> None:
        """The present engine has become ready; whoever waits for a replacement's end hears of it."""
        self._was_ready = True
        if self._trial is not None:
            if self._is_trying:
                self.config = self._trial.config
            self._trial.end(self.client.info)
            self._trial = None

    def _last_words(self) -> str:
        """What the engine said before it hung up. A Fatal that no retry would mend is the end of its kind."""
        fatal = self.client.fatal
        if fatal is None:
            return ""
        if not fatal.retryable:
            self._fail(error_of(fatal))
        return fatal.message

    def _load_timed_out(self) -> str:
        reason = f"not ready after {self.load_timeout_s:g} s (`load_timeout_s`)"
        if not self._was_ready:  # an engine that has never run here would most likely stop at the same place
            self._fail(
                EngineUnavailableError(
                    f"the engine was {reason}",
                    hint="raise `load_timeout_s`, or look at what the log says last",
                )
            )
        return reason

    async def _crashed(self, reason: str) -> None:
        """Counts a crash and returns when another try is due; after too many the client has failed."""
        delay_s = self._delay_after_crash()
        if delay_s is None:
            self._fail(
                EngineUnavailableError(
                    f"the engine died {MAX_CRASHES} times in {CRASH_WINDOW_S / 60:g} minutes, at last: "
                    f"{reason}",
                    hint="its own messages stand in the log; the server stays down until it is started again",
                )
            )
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end_asked.wait(), delay_s)
            return
        self.metrics.engine_restarted()

    def _delay_after_crash(self) -> float | None:
        """Seconds until the next try; None when there have been too many."""
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes[0] < now - CRASH_WINDOW_S:
            self._crashes.popleft()
        if len(self._crashes) >= MAX_CRASHES:
            return None
        return FIRST_BACKOFF_S * 2 ** (len(self._crashes) - 1)

    def _fail(self, failure: HalftoneError) -> None:
        """Starting again would end the same way: for an engine on trial the end of that, else for all."""
        if self._trial is not None and self._is_trying:
            self._trial.fail(failure)
            return
        logger.error("the engine stays down: %s", failure)
        self.client.fail(failure)

    async def _ask_to_exit(self, process: asyncio.subprocess.Process) -> None:
        """Shutdown, then SIGTERM. One that is still loading hears only the signal."""
        if self.client.is_serving:
            self.client.shut_down_engine()
            if await exits_within(process, EXIT_GRACE_S):
                return
        send_signal(process, signal.SIGTERM)
        await exits_within(process, EXIT_GRACE_S)

    async def _end_process(self, process: asyncio.subprocess.Process, grace_s: float) -> int:
        """Waits `grace_s` for the engine's exit, then kills it -> exit code."""
        if not await exits_within(process, grace_s):
            send_signal(process, signal.SIGKILL)
        return await process.wait()


async def exits_within(process: asyncio.subprocess.Process, timeout_s: float) -> bool:
    try:
        await asyncio.wait_for(process.wait(), timeout_s)
    except TimeoutError:
        return False
    return True


def send_signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Signals the engine and what it has spawned; it leads a process group of its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def error_of(fatal: Fatal) -> HalftoneError:
    """The engine's error as the exception it was there, so that its exit code is the same."""
    kinds = [HalftoneError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    kind = next((kind for kind in kinds if kind.code == fatal.code), HalftoneError)
    if kind is ShortageError:
        return ShortageError(
            fatal.message, hint=fatal.hint, needs_bytes=fatal.needs_bytes, has_bytes=fatal.has_bytes
        )
    return kind(fatal.message, hint=fatal.hint, code=fatal.code)


def describe_exit(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    note = " (the kernel does this when memory runs out)" if name == "SIGKILL" else ""
    return f"killed by {name}{note}"


def engine_environment(threads: int) -> dict[str, str]:
    """The child's environment. What the user has set for OpenMP stands, but for the setting `threads`.

    OpenMP's threads spin between two parallel regions by default. A decode step is hundreds of short regions,
    and where other threads want the same cores the spinning takes them away: a tenth of the speed was
    measured on two cores. A thousand turns bridge the gap between two regions and then let go of the core.
    """
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    else:
        environment.setdefault("OMP_NUM_THREADS", str(physical_cores()))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    environment.setdefault("GOMP_SPINCOUNT", "1000")
    return environment
