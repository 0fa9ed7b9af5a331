"""The GPU's energy -> counts of the precision that it is taken by, read beside the event loop.

Metrics --begin, read, close--> EnergyAccount --a thread of its own--> energy.EnergyMeter

NVML answers through the driver: a reading takes 2 ms, at times 13, and on a GPU that has failed it may take
for ever. On the event loop every stream would wait for it. The thread does one thing after the other, so that
readings come back in the order in which they were asked for; what they mean is added up on the event loop,
as all counts are.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from service.energy import EnergyMeter
from service.errors import DeviceError
from service.metrics.counts import Counts

logger = logging.getLogger(__name__)

PATIENCE_S = 0.5  # a page goes without new figures then: what else it tells is needed most when a GPU hangs


@dataclass(frozen=True, slots=True)
class Reading:
    joules: float  # since the driver was loaded
    watts: float


class EnergyAccount:
    """Of one engine while it serves. Built, read and closed in a running event loop."""

    def __init__(self, counts: Counts, device_uuid: str) -> None:
        """Counting begins with the first reading, which is asked for now."""
        self._counts = counts
        self._is_closed = False
        self._joules: float | None = None  # of the last reading that has come back
        self._meter: EnergyMeter | None = None  # the thread's alone
        self._thread = ThreadPoolExecutor(1, "energy")
        self._pending = self._ask(lambda: self._begin(device_uuid))

    async def read(self) -> None:
        """Counts what the GPU took up to now. Where the driver does not answer in time the joules stand as
        they are, with the next answer's in it they are right again, and there is no power."""
        if self._pending.done():
            self._pending = self._ask(self._read)
        _, late = await asyncio.wait({self._pending}, timeout=PATIENCE_S)
        if late:
            self._counts.scalars["halftone_power_watts"].clear()

    def close(self) -> None:
        """Nothing is served by this engine any more. What it took up to now is counted a moment later."""
        self._is_closed = True
        self._counts.scalars["halftone_power_watts"].clear()
        self._ask(self._end)
        self._thread.shutdown(wait=False)

    # --- on the event loop ---------------------------------------------------------------------

    def _ask(self, work: Callable[[], Reading | None]) -> "asyncio.Future[Reading | None]":
        asked = asyncio.get_running_loop().run_in_executor(self._thread, work)
        asked.add_done_callback(self._count)
        return asked

    def _count(self, asked: "asyncio.Future[Reading | None]") -> None:
        reading = asked.result()
        if reading is None:
            self._counts.scalars["halftone_power_watts"].clear()
            return
        before = reading.joules if self._joules is None else self._joules
        self._joules = reading.joules
        self._counts.add("halftone_energy_joules_total", reading.joules - before)
        if not self._is_closed:
            self._counts.set("halftone_power_watts", reading.watts)

    # --- in the thread -------------------------------------------------------------------------

    def _begin(self, device_uuid: str) -> Reading | None:
        self._meter = EnergyMeter.open(device_uuid)
        return self._read()

    def _read(self) -> Reading | None:
        """None where the device has no counter, or is lost, which is said once."""
        if self._meter is None:
            return None
        try:
            return Reading(self._meter.joules(), self._meter.watts())
        except DeviceError as error:
            logger.warning("energy figures end: %s", error.message)
            self._give_back()
            return None

    def _end(self) -> Reading | None:
        reading = self._read()
        self._give_back()
        return reading

    def _give_back(self) -> None:
        if self._meter is not None:
            self._meter.close()
            self._meter = None
