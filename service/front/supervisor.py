"""The engine's lives: spawns the child, listens for its heartbeat, starts another when it dies.

settings --> Supervisor --socket pair, process--> engine child
                 └── says to EngineClient: connected, gone, failed for good

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
from collections.abc import Sequence
from typing import Any

import msgspec

from service.cores import physical_cores
from service.errors import EngineUnavailableError, HalftoneError, SystemProblem
from service.front.engine_client import EngineClient
from service.messages import EngineConfig, Fatal
from service.metrics import Metrics

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "service.engine.child")
MAX_CRASHES = 5
CRASH_WINDOW_S = 600.0
FIRST_BACKOFF_S = 0.25  # doubled with each crash in the window
EXIT_GRACE_S = 5.0  # between Shutdown and SIGTERM, and again before SIGKILL


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
        self._stop_asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins the first life; `client.wait_ready` says how it went."""
        self._task = asyncio.create_task(self._live(), name="engine supervisor")

    async def stop(self) -> None:
        """Ends the engine and waits until its process is gone. Open requests end with an error."""
        self.client.drain()
        self._stop_asked.set()
        if self._task is not None:
            await self._task

    # --- inside --------------------------------------------------------------------------------

    async def _live(self) -> None:
        try:
            while True:
                reason = await self._one_life()
                if self.client.state == "failed" or self._stop_asked.is_set():
                    return
                delay_s = self._crashed(reason)
                if delay_s is None:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop_asked.wait(), delay_s)
                    return
                self.metrics.engine_restarted()
        except Exception as error:
            logger.exception("the engine's supervisor failed")
            self.client.fail(HalftoneError(f"the engine cannot be started: {error}"))

    async def _one_life(self) -> str:
        """Spawns an engine and returns, once its process is gone, why it is."""
        front_socket, engine_socket = socket.socketpair()
        try:
            process = self.process = await self._spawn(engine_socket)
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
            if self._stop_asked.is_set():
                await self._ask_to_exit(process)
            elif hung_up.done():
                grace_s = 1.0  # it ends by itself: time to write its last words and to set its exit code
        finally:
            self.client.disconnect()
            exit_code = await self._end_process(process, grace_s)
        reason = reason or describe_exit(exit_code)
        logger.log(
            logging.INFO if self._stop_asked.is_set() else logging.ERROR,
            "engine process %d is gone: %s",
            process.pid,
            reason,
        )
        return reason

    async def _spawn(self, engine_socket: socket.socket) -> asyncio.subprocess.Process:
        fd = engine_socket.fileno()
        return await asyncio.create_subprocess_exec(
            *self.command,
            *("--fd", str(fd)),
            *("--config", msgspec.json.encode(self.config).decode()),
            pass_fds=(fd,),
            stdin=asyncio.subprocess.DEVNULL,
            env=engine_environment(self.config.threads),
            start_new_session=True,  # ctrl-C is for the front, which drains before it ends the engine
        )

    async def _watch(self, process: asyncio.subprocess.Process, hung_up: asyncio.Future[None]) -> str:
        """Waits for the engine's end -> why it has to end; empty: it ended by itself."""
        started_at = time.monotonic()
        exited = asyncio.create_task(process.wait())
        ready = asyncio.create_task(self.client.wait_for("ready"))
        stop_asked = asyncio.create_task(self._stop_asked.wait())
        events: list[asyncio.Future[Any]] = [exited, hung_up, stop_asked, ready]
        try:
            while not (exited.done() or hung_up.done() or stop_asked.done()):
                if ready.done():
                    self._was_ready = True
                    events = [exited, hung_up, stop_asked]
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
            for task in (exited, stop_asked, ready):
                task.cancel()

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

    def _crashed(self, reason: str) -> float | None:
        """Counts a crash -> seconds until the next try, None when there will be none."""
        now = time.monotonic()
        self._crashes.append(now)
        while self._crashes[0] < now - CRASH_WINDOW_S:
            self._crashes.popleft()
        if len(self._crashes) < MAX_CRASHES:
            return FIRST_BACKOFF_S * 2 ** (len(self._crashes) - 1)
        self._fail(
            EngineUnavailableError(
                f"the engine died {MAX_CRASHES} times in {CRASH_WINDOW_S / 60:g} minutes, at last: {reason}",
                hint="its own messages stand in the log; the server stays down until it is started again",
            )
        )
        return None

    def _fail(self, failure: HalftoneError) -> None:
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
