"""Requests at their times: a closed loop of so many streams, or an open loop that waits for nobody.

workload --closed_loop, open_loop--> client.send, and records --> statistics

The clock is the event loop's, so a test can run these loops on virtual time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from loadtest.statistics import Record, describe

Send = Callable[[int, Record], Awaitable[None]]
LAG_PERIOD_S = 0.01


async def closed_loop(send: Send, num_warmup: int, num_requests: int, concurrency: int) -> list[Record]:
    """`concurrency` streams, each sending its next request when its last has ended.

    Warm-up requests all end before the first measured one starts. A request is due when a stream is free.
    """
    loop = asyncio.get_running_loop()
    records: list[Record] = []

    async def stream(indices: "asyncio.Queue[int]", warmup: bool) -> None:
        while not indices.empty():
            index = indices.get_nowait()
            record = Record(index, scheduled_s=loop.time(), warmup=warmup)
            records.append(record)
            await send(index, record)

    for first, count, warmup in ((0, num_warmup, True), (num_warmup, num_requests, False)):
        indices: asyncio.Queue[int] = asyncio.Queue()
        for index in range(first, first + count):
            indices.put_nowait(index)
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, count)):
                group.create_task(stream(indices, warmup))
    return records


async def open_loop(send: Send, arrivals_s: Sequence[float], num_warmup: int) -> list[Record]:
    """One request at each arrival time, however many are still open; the first `num_warmup` are discarded."""
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    records = [
        Record(index, start_s + due_s, warmup=index < num_warmup) for index, due_s in enumerate(arrivals_s)
    ]
    async with asyncio.TaskGroup() as group:
        for record in records:
            await asyncio.sleep(max(0.0, record.scheduled_s - loop.time()))
            group.create_task(_sent(send, record))
    return records


async def _sent(send: Send, record: Record) -> None:
    await send(record.index, record)


@dataclass
class OwnLoad:
    """What the generator itself cost: its share of one core, and how late its event loop woke up."""

    lags_s: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0

    async def watch(self) -> None:
        """Until cancelled: sleep a little, and note by how much it was longer."""
        loop = asyncio.get_running_loop()
        cpu_start_s, wall_start_s = time.process_time(), loop.time()
        try:
            while True:
                before_s = loop.time()
                await asyncio.sleep(LAG_PERIOD_S)
                self.lags_s.append(loop.time() - before_s - LAG_PERIOD_S)
        finally:
            self.cpu_s = time.process_time() - cpu_start_s
            self.wall_s = loop.time() - wall_start_s

    def summary(self, records: Sequence[Record]) -> dict[str, object]:
        return {
            "cpu_share": self.cpu_s / self.wall_s if self.wall_s else 0.0,
            "lag_s": describe(self.lags_s),
            "dispatch_delay_s": describe(record.sent_s - record.scheduled_s for record in records),
        }
