"""Energy of the device while load runs: NVML's counter read now and then, and the joules of any window
between.

mode.measure() --PowerLog.running()--> loads.read_run() --joules_between()--> Energy

Streams pass through the event loop that this runs on, so that a reading, of milliseconds, is a thread's work.
"""

import asyncio
import contextlib
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator

from service.energy import EnergyMeter

PERIOD_S = 0.1  # the driver renews its counter some ten times a second
IDLE_S = 1.0


class PowerLog:
    """Readings of one device's energy counter, on the monotonic clock that the load generator reads too."""

    def __init__(self, meter: EnergyMeter) -> None:
        self.idle_watts = 0.0
        self._meter = meter
        self._times_s: list[float] = []
        self._joules: list[float] = []

    async def watch_idle(self) -> None:
        """Takes `idle_watts`: the mean over a second in which nothing is asked."""
        start_s, before = await asyncio.to_thread(self._now)
        await asyncio.sleep(IDLE_S)
        end_s, after = await asyncio.to_thread(self._now)
        self.idle_watts = (after - before) / (end_s - start_s)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Reads while the block runs, at its beginning and at its end."""
        await self._read()
        ended = asyncio.Event()
        reading = asyncio.create_task(self._read_until(ended))
        try:
            yield
        finally:
            ended.set()
            await reading

    def joules_between(self, start_s: float, end_s: float) -> float:
        """Of a window inside what was read; linear between two readings."""
        return self._joules_at(end_s) - self._joules_at(start_s)

    async def _read_until(self, ended: asyncio.Event) -> None:
        while not ended.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), PERIOD_S)
            await self._read()

    async def _read(self) -> None:
        time_s, joules = await asyncio.to_thread(self._now)
        self._times_s.append(time_s)
        self._joules.append(joules)

    def _now(self) -> tuple[float, float]:
        """(monotonic seconds, joules), in a thread."""
        return time.monotonic(), self._meter.joules()

    def _joules_at(self, time_s: float) -> float:
        place = bisect_left(self._times_s, time_s)
        if place == 0 or place == len(self._times_s):
            return self._joules[min(place, len(self._joules) - 1)]
        before_s, after_s = self._times_s[place - 1 : place + 1]
        before, after = self._joules[place - 1 : place + 1]
        return before + (after - before) * (time_s - before_s) / (after_s - before_s)


@contextlib.contextmanager
def metered(device_uuid: str) -> Iterator[PowerLog | None]:
    """The device's log; None where it has no counter. Why is logged."""
    meter = EnergyMeter.open(device_uuid)
    try:
        yield PowerLog(meter) if meter else None
    finally:
        if meter:
            meter.close()
