"""Who is sent when, on a clock that jumps."""

import asyncio

import pytest
import virtual_time

from loadtest.drive import closed_loop, open_loop
from loadtest.job import Job, Outcome
from loadtest.statistics import Record, summarize
from loadtest.worker import perform
from loadtest.workload import Workload


class StallingServer:
    """Answers one request at a time, each in 10 ms, but the fifth takes 2 s."""

    def __init__(self) -> None:
        self.free = asyncio.Lock()
        self.open = self.most_open = self.answered = 0

    async def send(self, record: Record) -> None:
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
            await open_loop(StallingServer().send, list(enumerate(arrivals_s))),
            await closed_loop(StallingServer().send, range(100), [0]),
        )

    opened, closed = virtual_time.run(both())
    assert [record.scheduled_s for record in opened] == pytest.approx(arrivals_s)
    assert [record.sent_s for record in opened] == pytest.approx(arrivals_s)
    waits = [record.ttft_s for record in opened]
    assert waits[4] == pytest.approx(2.0)
    assert waits[5] == pytest.approx(2.0 - 0.02 + 0.01)  # due 20 ms later, behind the stalled one
    assert sum(wait > 0.5 for wait in waits) > 50
    assert sum(record.ttft_s > 0.5 for record in closed) == 1
    assert summarize(opened)["ttft_s"]["p95"] > 100 * summarize(closed)["ttft_s"]["p95"]


def test_a_request_sent_late_is_timed_from_its_schedule() -> None:
    async def busy_then_drive() -> list[Record]:
        server = StallingServer()

        async def send(record: Record) -> None:
            await asyncio.sleep(0.3)  # the generator itself was busy
            await server.send(record)

        return await open_loop(send, [(0, 0.0)])

    (record,) = virtual_time.run(busy_then_drive())
    assert record.sent_s == pytest.approx(0.3)
    assert record.ttft_s == pytest.approx(0.31)


@pytest.mark.parametrize("streams", [[0], [1, 3, 5]])
def test_a_closed_loop_keeps_its_streams_busy(streams: list[int]) -> None:
    server_holder: list[StallingServer] = []

    async def drive() -> list[Record]:
        server_holder.append(StallingServer())
        return await closed_loop(server_holder[0].send, range(4, 13), streams)

    records = virtual_time.run(drive())
    assert server_holder[0].most_open == len(streams)
    assert sorted(record.index for record in records) == list(range(4, 13))
    assert {record.stream for record in records} == set(streams)


def test_a_window_in_which_all_streams_are_busy() -> None:
    """Two streams, three requests of 1 s each: the last runs alone, and its rate is not the server's."""

    async def second_a_request(record: Record) -> None:
        clock = asyncio.get_running_loop()
        record.sent_s = clock.time()
        await asyncio.sleep(0.5)
        record.arrivals = [(clock.time(), 1)]
        await asyncio.sleep(0.5)
        record.finished_s = clock.time()
        record.arrivals.append((clock.time(), 2))
        record.output_tokens, record.finish_reason = 2, "length"

    async def drive() -> list[Record]:
        return await closed_loop(second_a_request, range(3), [0, 1])

    summary = summarize(virtual_time.run(drive()))
    assert summary["window_s"] == pytest.approx(2)
    assert summary["output_tokens_per_s"] == pytest.approx(6 / 2)
    assert summary["all_busy"] == pytest.approx({"window_s": 1, "output_tokens": 4, "output_tokens_per_s": 4})


@pytest.mark.parametrize("closed", [True, False])
def test_a_job_starts_on_time_and_marks_its_warm_up(closed: bool) -> None:
    class Client:
        async def send(self, body: bytes, record: Record) -> None:
            record.sent_s = asyncio.get_running_loop().time()
            assert body == b"%d" % record.index

    job = Job(
        url="http://x",
        api_key="",
        timeout_s=1.0,
        workload=Workload("m", (), 1),
        indices=(0, 1, 2),
        streams=(0,) if closed else (),
        due_s=() if closed else (0.0, 0.25, 0.5),
        num_warmup=1,
    )
    bodies = {index: b"%d" % index for index in job.indices}

    async def drive() -> Outcome:
        return await perform(job, Client(), bodies, start_s=2.0)  # type: ignore[arg-type]

    outcome = virtual_time.run(drive())
    sent_s = [record.sent_s for record in outcome.records]
    assert sent_s == pytest.approx([2.0] * 3 if closed else [2.0, 2.25, 2.5])
    assert [record.warmup for record in outcome.records] == [True, False, False]
    assert outcome.wall_s == pytest.approx(0.0 if closed else 0.5)
    assert outcome.lags_s == pytest.approx([0.0] * len(outcome.lags_s), abs=1e-9)
