"""Joules of a window from readings around it, with a meter made by hand."""

import asyncio
import threading

import pytest

from service.compare import power
from service.compare.figures import Energy
from service.compare.loads import energy_of
from service.compare.power import PowerLog, metered
from service.energy import EnergyMeter


class Clock:
    """A second passes at each reading; the device takes 50 W, and 200 W from the third second on."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.readers: set[int] = set()

    def monotonic(self) -> float:
        return self.now_s

    def joules(self) -> float:
        self.readers.add(threading.get_ident())
        joules = 50 * self.now_s + 150 * max(0.0, self.now_s - 3)
        self.now_s += 1
        return joules


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(power.time, "monotonic", made.monotonic)
    monkeypatch.setattr(power, "PERIOD_S", 0.0)
    monkeypatch.setattr(power, "IDLE_S", 0.0)
    return made


def test_joules_of_a_window_are_read_between_readings(clock: Clock) -> None:
    log = PowerLog(clock)  # type: ignore[arg-type]

    async def watch() -> None:
        async with log.running():
            while clock.now_s < 9:
                await asyncio.sleep(0)

    asyncio.run(watch())
    assert log.joules_between(1.0, 2.0) == pytest.approx(50)
    assert log.joules_between(2.5, 4.0) == pytest.approx(75 + 150)
    assert log.joules_between(4.0, 6.5) == pytest.approx(500)
    run = {
        "monotonic_s": 4.0,
        "requests": [
            {"index": 0, "scheduled_s": 0.0, "finished_s": 1.0, "warmup": True},
            {"index": 1, "scheduled_s": 0.5, "finished_s": 2.0, "warmup": False},
            {"index": 2, "scheduled_s": 1.0, "finished_s": 3.0, "error": "broken"},
        ],
    }
    log.idle_watts = 50.0
    assert energy_of(run, log) == Energy(joules=pytest.approx(300), window_s=1.5, idle_watts=50.0)


def test_idle_power_is_the_mean_over_a_while(clock: Clock) -> None:
    log = PowerLog(clock)  # type: ignore[arg-type]
    asyncio.run(log.watch_idle())
    assert log.idle_watts == pytest.approx(50)


def test_streams_do_not_wait_for_a_reading(clock: Clock) -> None:
    log = PowerLog(clock)  # type: ignore[arg-type]

    async def watch() -> None:
        await log.watch_idle()
        async with log.running():
            await asyncio.sleep(0)

    asyncio.run(watch())
    assert clock.readers
    assert threading.get_ident() not in clock.readers


def test_a_device_without_a_counter_has_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Meter:
        def close(self) -> None:
            closed.append(True)

    with metered("") as log:
        assert log is None
    monkeypatch.setattr(EnergyMeter, "open", lambda _: Meter())
    with metered("GPU-1") as log:
        assert log is not None
    assert closed == [True]
