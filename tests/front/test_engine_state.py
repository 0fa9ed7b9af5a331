"""What requests see of an engine that comes and goes, is held, or is on its way out."""

import asyncio

import pytest

from service.errors import DeviceError
from service.front import engine_state
from service.front.engine_state import EngineState
from service.metrics import Metrics

pytestmark = pytest.mark.anyio


@pytest.fixture
def state() -> EngineState:
    return EngineState(Metrics("demo", "auto"), max_held_requests=2, swap_wait_s=60)


def up(state: EngineState) -> float | None:
    return state._metrics.numbers("halftone_engine_up").get(())


async def test_held_requests_see_nothing_of_the_engines_behind(state: EngineState) -> None:
    state.enter("ready")
    state.hold(10)
    seen = [state.now]
    for of_engine in ("down", "starting", "ready"):
        state.enter(of_engine)  # type: ignore[arg-type]
        seen.append(state.now)
        assert up(state) == 0
    assert set(seen) == {"swapping"}
    state.release()
    assert state.now == "ready"
    assert up(state) == 1


async def test_release_shows_the_engine_as_it_is(state: EngineState) -> None:
    state.enter("ready")
    state.hold(10)
    state.enter("down")
    state.release()
    assert state.now == "down"


async def test_failure_and_shutdown_show_through_a_hold(state: EngineState) -> None:
    state.enter("ready")
    state.hold(10)
    state.drain()
    state.enter("ready")
    assert state.now == "draining"
    state.fail(DeviceError("the device is gone"))
    assert state.now == "failed"
    assert "the device is gone" in state.unavailable().message


async def test_who_is_held_is_told_when_to_come_back(
    state: EngineState, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(engine_state.time, "monotonic", lambda: now)
    state.enter("ready")
    state.hold(12.5)
    assert state.unavailable().retry_after_s == 13
    now = 110.0
    assert state.unavailable().retry_after_s == 3
    now = 200.0  # longer than expected: soon, as far as anyone can tell
    assert state.unavailable().retry_after_s == 1


async def test_a_waiter_that_gave_up_is_forgotten(state: EngineState) -> None:
    """Requests that wait for a swap and run into their limit must not pile up until its end."""
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(state.wait_for("ready"), 0)
    assert state._waiters == []
    waiting = asyncio.create_task(state.wait_for("ready", "failed"))
    await asyncio.sleep(0)
    state.enter("ready")
    await waiting
