"""Requests at their times: a closed loop of so many streams, or an open loop that waits for nobody.

worker --closed_loop, open_loop--> client.send, and records --> worker

The clock is the event loop's, so a test can run these loops on virtual time.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from loadtest.statistics import Record

Send = Callable[[Record], Awaitable[object]]
LAG_PERIOD_S = 0.01


async def closed_loop(send: Send, indices: Sequence[int], streams: Sequence[int]) -> list[Record]:
    """The named streams, each sending the next request when its last has ended. A request is due when a
    stream is free."""
    loop = asyncio.get_running_loop()
    waiting = deque(indices)
    records: list[Record] = []

    async def run(stream: int) -> None:
        while waiting:
            record = Record(waiting.popleft(), scheduled_s=loop.time(), stream=stream)
            records.append(record)
            await send(record)

    async with asyncio.TaskGroup() as group:
        for stream in streams:
            group.create_task(run(stream))
    return records


async def open_loop(send: Send, arrivals: Sequence[tuple[int, float]]) -> list[Record]:
    """(index, time it is due) of each request, in order -> a request at each time, however many are open."""
    loop = asyncio.get_running_loop()
    records = [Record(index, scheduled_s=due_s) for index, due_s in arrivals]
    async with asyncio.TaskGroup() as group:
        for record in records:
            await asyncio.sleep(max(0.0, record.scheduled_s - loop.time()))
            group.create_task(_sent(send, record))
    return records


async def _sent(send: Send, record: Record) -> None:
    await send(record)


@dataclass
class OwnLoad:
    """What a client process itself cost: its share of one core, and how late its event loop woke up."""

    lags_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Measures while the block runs."""
        loop = asyncio.get_running_loop()
        cpu_start_s, wall_start_s = time.process_time(), loop.time()
        watch = asyncio.create_task(self._watch(loop))
        try:
            yield
        finally:
            watch.cancel()
            self.cpu_s = time.process_time() - cpu_start_s
            self.wall_s = loop.time() - wall_start_s

    async def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Until cancelled: sleep a little, and note by how much it was longer."""
        while True:
            before_s = loop.time()
            await asyncio.sleep(LAG_PERIOD_S)
            self.lags_s.append(loop.time() - before_s - LAG_PERIOD_S)
