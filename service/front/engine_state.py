"""The engine's state as requests see it, who waits for another one, and what is said to those who cannot.

engine_client, supervisor, swap --enter, hold, drain, fail--> EngineState --state, unavailable()--> api/

What the engine itself does is one thing (loading, ready, gone); the server may be doing another over several
engines. While a precision is swapped requests are held, whatever engine is there; from the first signal on
none is taken.
"""

import asyncio
import math
import time
from typing import Literal

from service.errors import EngineUnavailableError, HalftoneError
from service.metrics import Metrics

State = Literal["starting", "ready", "swapping", "draining", "down", "failed"]

DOING = {
    "starting": "is loading the model",
    "swapping": "is changing its precision",
    "draining": "is shutting down",
    "down": "has died and is being started again",
}
OTHERS: tuple[State, ...] = ("starting", "ready", "draining", "down", "failed")  # than `swapping`
LEAST_RETRY_S = 1


class EngineState:
    """Of one engine client, over all the engines that it is connected to."""

    def __init__(self, metrics: Metrics, max_held_requests: int, swap_wait_s: float) -> None:
        self.now: State = "starting"
        self.failure: HalftoneError | None = None  # why the state is `failed`
        self.is_draining = False  # no request is taken any more, whatever becomes of the engine
        self.max_held_requests = max_held_requests
        self.swap_wait_s = swap_wait_s
        self._num_held = 0
        self._metrics = metrics
        self._of_engine: State = "starting"  # what there would be without hold or drain
        self._held_until: float | None = None  # about when a swap will be over; None: there is none
        self._waiters: list[tuple[tuple[State, ...], asyncio.Future[None]]] = []

    def enter(self, state: State) -> None:
        """The engine came into `state`."""
        self._of_engine = state
        if self.is_draining and state in ("starting", "ready"):
            state = "draining"
        elif self._held_until is not None and not self.is_draining and state != "failed":
            state = "swapping"
        self.now = state
        # gauges follow the engine that comes and goes behind a swap
        hidden = state == "swapping" and self._of_engine != "ready"
        self._metrics.engine_state(self._of_engine if hidden else state)
        waiters, self._waiters = self._waiters, []
        for states, entered in waiters:
            if state not in states:
                self._waiters.append((states, entered))
            elif not entered.done():
                entered.set_result(None)

    def hold(self, expected_s: float) -> None:
        """Requests wait from now on, `expected_s` seconds as far as anyone can tell."""
        self._held_until = time.monotonic() + expected_s
        self.enter(self._of_engine)

    def release(self) -> None:
        """The end of `hold`: requests find the engine as it is now."""
        self._held_until = None
        self.enter(self._of_engine)

    def drain(self) -> None:
        """No request is taken from now on."""
        self.is_draining = True
        self.enter("draining")

    def fail(self, failure: HalftoneError) -> None:
        """There will be no other engine."""
        self.failure = failure
        self.enter("failed")

    async def wait_for(self, *states: State) -> None:
        """Returns when one of `states` has been entered, even if it was left at once."""
        if self.now not in states:
            waiter = states, asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter[1]
            finally:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)

    async def past_swap(self) -> None:
        """Waits while the precision is swapped, `swap_wait_s` at most; returns at once where it is not.

        EngineUnavailableError, with the time to come back, when that was too long or too many wait already.
        """
        if self.now != "swapping":
            return
        if self._num_held < self.max_held_requests:
            self._num_held += 1
            try:
                await asyncio.wait_for(self.wait_for(*OTHERS), self.swap_wait_s)
                return
            except TimeoutError:
                pass
            finally:
                self._num_held -= 1
        self._metrics.rejected("swapping")
        raise self.unavailable()

    def unavailable(self) -> EngineUnavailableError:
        """Why no request is taken, and when to come back."""
        if self.failure is not None:
            return EngineUnavailableError(
                f"the engine cannot run: {self.failure.message}", hint=self.failure.hint
            )
        error = EngineUnavailableError(
            f"the engine {DOING.get(self.now, 'is not ready')}", hint="try again when `/ready` says 200"
        )
        if self.now == "swapping" and self._held_until is not None:
            error.retry_after_s = max(LEAST_RETRY_S, math.ceil(self._held_until - time.monotonic()))
        return error
