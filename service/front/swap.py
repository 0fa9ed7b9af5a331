"""One precision in the place of another, from the same checkpoint, while the server stays up.

api/admin --begin--> Swapper --hold, drain--> engine_client, --replace--> supervisor
api/admin <--events of a Swap-- Swapper

1. A process of its own looks whether the precision can be served at all; the engine serves on meanwhile.
2. Requests are held. Those that are open go on to their end; where that is not reached in `drain_timeout_s`
   the swap is given up, for nobody's answer is worth less than a swap.
3. The engine ends, and with it all that it had on the device. Another starts in the new precision, checks
   itself and passes the canary (engine/canary) before it says that it is ready.
4. If it does not get there, one in the old precision is started again. Held requests go on to what serves.

A swap belongs to the server: it goes on when who asked for it has hung up.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec

from service.errors import (
    ConflictError,
    EngineUnavailableError,
    HalftoneError,
    PrecisionError,
    RequestError,
)
from service.front.engine_client import EngineClient
from service.front.supervisor import Supervisor, engine_environment, error_of
from service.messages import SHUTTING_DOWN, EngineConfig, EngineInfo, Fatal, Loading
from service.metrics import Metrics
from service.precision import canonical_of

logger = logging.getLogger(__name__)

Outcome = Literal["swapped", "unchanged", "given_up", "rolled_back", "failed"]
DRAIN_REPORT_S = 1.0
CHECK_TIMEOUT_S = 120.0


class Swap:
    """What is told of one swap, to at most one listener."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._is_heard = True

    def tell(self, **event: Any) -> None:
        if self._is_heard:
            self._events.put_nowait(event)

    def stage(self, stage: str, done: int, total: int, unit: str) -> None:
        self.tell(stage=stage, done=done, total=total, unit=unit)

    def end(self) -> None:
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Stages with what is done and the total in its unit; the last one is `done` with the outcome."""
        try:
            while (event := await self._events.get()) is not None:
                yield event
        finally:
            self._is_heard = False


class Swapper:
    """Swaps of one engine, one at a time."""

    def __init__(
        self, client: EngineClient, supervisor: Supervisor, metrics: Metrics, drain_timeout_s: float
    ) -> None:
        self.client = client
        self.supervisor = supervisor
        self.metrics = metrics
        self.drain_timeout_s = drain_timeout_s
        self._is_busy = False
        self._task: asyncio.Task[None] | None = None

    async def begin(self, precision: str, drain_timeout_s: float | None = None) -> Swap:
        """Starts a swap to `precision` -> what is told of it. `drain_timeout_s`: None: the setting.

        Raises RequestError for what can never be served, ConflictError while another swap runs, and
        EngineUnavailableError where no engine serves that could be gone back to.
        """
        if self._is_busy:
            raise ConflictError(
                "another swap is under way", hint="ask again when it has ended", code="swap_in_progress"
            )
        info = self.client.info
        if self.client.state != "ready" or info is None:
            raise self.client.engine_state.unavailable()
        before = self.supervisor.config
        try:
            precision = canonical_of(precision)
        except PrecisionError as error:
            raise refused(error) from None
        after = msgspec.structs.replace(before, precision=precision, canary=True, save="")
        swap = Swap()
        if after.precision in (info.precision, before.precision):
            swap.tell(**result("unchanged", info, info, 0.0))
            swap.end()
            return swap
        self._is_busy = True
        try:
            await self._refuse_unusable(after)
        except BaseException:
            self._is_busy = False
            raise
        limit_s = self.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        self._task = asyncio.create_task(self._run(swap, info, after, limit_s), name="swap")
        return swap

    async def close(self) -> None:
        """The server is shut down: ends a swap that is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- inside --------------------------------------------------------------------------------

    async def _refuse_unusable(self, config: EngineConfig) -> None:
        """RequestError for a precision that no engine could serve here: nobody waits for that to come out."""
        try:
            await check(config, self.supervisor)
        except HalftoneError as error:
            if type(error) is HalftoneError:  # the check itself failed, which is not the request's fault
                raise
            raise refused(error) from None

    async def _run(self, swap: Swap, before: EngineInfo, config: EngineConfig, limit_s: float) -> None:
        started_at = time.monotonic()
        expected_s = sum(before.load_seconds.values())
        state = self.client.engine_state
        outcome: Outcome = "failed"
        failure: HalftoneError | None = None
        info = before
        logger.info("the precision is swapped: `%s` -> `%s`", before.precision, config.precision)
        state.hold(expected_s)
        self.client.on_loading = lambda stage: tell_loading(swap, stage)

        def roll_back(error: HalftoneError) -> None:
            state.hold(expected_s)
            swap.tell(stage="roll_back", done=0, total=1, unit="engines", error=described(error))

        try:
            await self._drain(swap, limit_s)
            swap.stage("stop", 0, 1, "engines")
            state.hold(expected_s)
            try:
                info = await self.supervisor.replace(config, roll_back)
                outcome = "swapped"
                # it has passed: started again, it need not
                self.supervisor.config = msgspec.structs.replace(config, canary=False)
            except HalftoneError as error:
                failure = error
                outcome = "rolled_back" if self.client.is_serving else "failed"
        except DrainTimeoutError as error:
            outcome, failure = "given_up", error
        except asyncio.CancelledError:
            failure = EngineUnavailableError(f"the {SHUTTING_DOWN}")
            raise
        finally:
            seconds = time.monotonic() - started_at
            self.client.on_loading = None
            self.metrics.swapped(outcome, seconds)
            self._is_busy = False
            state.release()
            log = logger.info if failure is None else logger.error
            log("swap to `%s`: %s after %.1f s", config.precision, outcome.replace("_", " "), seconds)
            swap.tell(**result(outcome, before, info, seconds, failure))
            swap.end()

    async def _drain(self, swap: Swap, limit_s: float) -> None:
        """Returns when no request is open. Raises DrainTimeoutError after `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        total = self.client.num_open
        while num_open := self.client.num_open:
            swap.stage("drain", total - num_open, total, "requests")
            rest_s = deadline - time.monotonic()
            if rest_s <= 0:
                raise DrainTimeoutError(
                    f"{num_open} of {total} open requests did not end in {limit_s:g} s; the swap is given "
                    "up and they go on",
                    hint="ask again with a larger `drain_timeout_s`",
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.client.wait_idle(), min(rest_s, DRAIN_REPORT_S))
        swap.stage("drain", total, total, "requests")


class DrainTimeoutError(HalftoneError):
    """Open requests took too long."""

    code = "drain_timeout"


async def check(config: EngineConfig, supervisor: Supervisor) -> None:
    """Asks the engine's program whether it could begin with `config`. Raises what it says if not."""
    process = await asyncio.create_subprocess_exec(
        *supervisor.command,
        "--check",
        *("--config", msgspec.json.encode(config).decode()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=engine_environment(config.threads),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            said, _ = await process.communicate()
    except TimeoutError:
        raise HalftoneError(
            f"the check of `{config.precision}` took longer than {CHECK_TIMEOUT_S:g} s"
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        try:
            fatal = msgspec.json.decode(said, type=Fatal)
        except msgspec.MsgspecError:
            fatal = Fatal("internal_error", f"the check of `{config.precision}` failed; the log says why")
        raise error_of(fatal)


def refused(error: HalftoneError) -> RequestError:
    """An error of the settings as one of the request that has them now."""
    return RequestError(error.message, hint=error.hint, param="precision", code=error.code)


def tell_loading(swap: Swap, loading: Loading) -> None:
    swap.stage(loading.stage, loading.done, loading.total, loading.unit)


def result(
    outcome: Outcome,
    before: EngineInfo,
    now: EngineInfo,
    seconds: float,
    failure: HalftoneError | None = None,
) -> dict[str, Any]:
    """The last event: what serves now, and why it is not what was asked for."""
    return {
        "stage": "done",
        "outcome": outcome,
        "precision": now.precision,
        "previous": before.precision,
        "seconds": round(seconds, 3),
        "canary": now.canary if outcome == "swapped" else {},
        "error": described(failure) if failure is not None else None,
    }


def described(error: HalftoneError) -> dict[str, str]:
    return {"code": error.code, "message": error.message, "hint": error.hint}
