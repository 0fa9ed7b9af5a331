"""Who is sent when, on a clock that jumps."""

import asyncio

import pytest
import virtual_time

from loadtest.drive import closed_loop, open_loop
from loadtest.statistics import Record, summarize


class StallingServer:
    """Answers one request at a time, each in 10 ms, but the fifth takes 2 s."""

    def __init__(self) -> None:
        self.free = asyncio.Lock()
        self.open = self.most_open = self.answered = 0

    async def send(self, index: int, record: Record) -> None:
        clock = asyncio.get_running_loop()
        record.sent_s = clock.time()
        self.open += 1
        self.most_open = max(self.open, self.most_open)
        async with self.free:
            self.answered += 1
            await asyncio.sleep(2.0 if self.answered == 5 else 0.01)
        self.open -= 1
        record.arrivals = [(clock.time(), 1)]
        record.finished_s, record.output_tokens, record.finish_reason = clock.time(), 1, "length"


def test_an_open_loop_counts_the_wait_that_a_stall_causes() -> None:
    """Coordinated omission: the closed loop sees one slow request, whoever keeps a schedule sees them all."""
    arrivals_s = [0.02 * index for index in range(100)]

    async def both() -> tuple[list[Record], list[Record]]:
        return (
            await open_loop(StallingServer().send, arrivals_s, 0),
            await closed_loop(StallingServer().send, 0, 100, 1),
        )

    opened, closed = virtual_time.run(both())
    assert [record.scheduled_s for record in opened] == pytest.approx(arrivals_s)
    assert [record.sent_s for record in opened] == pytest.approx(arrivals_s)
    waits = [record.ttft_s for record in opened]
    assert waits[4] == pytest.approx(2.0)
    assert waits[5] == pytest.approx(2.0 - 0.02 + 0.01)  # due 20 ms later, behind the stalled one
    assert sum(wait > 0.5 for wait in waits) > 50
    assert sum(record.ttft_s > 0.5 for record in closed) == 1
    assert summarize(opened, 1)["ttft_s"]["p95"] > 100 * summarize(closed, 1)["ttft_s"]["p95"]


def test_a_request_sent_late_is_timed_from_its_schedule() -> None:
    async def busy_then_drive() -> list[Record]:
        server = StallingServer()

        async def send(index: int, record: Record) -> None:
            await asyncio.sleep(0.3)  # the generator itself was busy
            await server.send(index, record)

        return await open_loop(send, [0.0], 0)

    (record,) = virtual_time.run(busy_then_drive())
    assert record.sent_s == pytest.approx(0.3)
    assert record.ttft_s == pytest.approx(0.31)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_closed_loop_keeps_its_streams_busy_and_warms_up_first(concurrency: int) -> None:
    server_holder: list[StallingServer] = []

    async def drive() -> list[Record]:
        server_holder.append(StallingServer())
        return await closed_loop(server_holder[0].send, 4, 9, concurrency)

    records = virtual_time.run(drive())
    assert server_holder[0].most_open == concurrency
    assert sorted(record.index for record in records) == list(range(13))
    warm = [record for record in records if record.warmup]
    assert len(warm) == 4
    assert max(record.finished_s for record in warm) <= min(
        record.scheduled_s for record in records if not record.warmup
    )
