"""One run in shares: nothing lost, nothing twice, and a stream's requests beside its stream."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest import fleet
from loadtest.fleet import num_clients
from loadtest.job import Job, Outcome, frame, job_of, outcome_of, shares
from loadtest.prompts import Prompt
from loadtest.statistics import Record
from loadtest.workload import Workload


def job(num_requests: int, num_streams: int = 0, num_warmup: int = 0) -> Job:
    return Job(
        url="http://x:1",
        api_key="k",
        timeout_s=1.5,
        workload=Workload("m", (Prompt("a"), Prompt("b")), 4, seed=3),
        indices=tuple(range(num_requests)),
        streams=tuple(range(num_streams)),
        due_s=() if num_streams else tuple(0.5 * index for index in range(num_requests)),
        num_warmup=num_warmup,
    )


@given(st.integers(1, 200), st.integers(0, 40), st.integers(1, 9))
def test_shares_are_the_whole(num_requests: int, num_streams: int, num_processes: int) -> None:
    whole = job(num_requests, num_streams)
    parts = shares(whole, num_processes)
    assert len(parts) == (min(num_processes, num_streams) if num_streams else num_processes)
    assert sorted(index for part in parts for index in part.indices) == list(whole.indices)
    assert sorted(stream for part in parts for stream in part.streams) == list(whole.streams)
    for part in parts:
        assert bool(part.streams) == bool(whole.streams)
        if not num_streams:
            assert part.due_s == tuple(0.5 * index for index in part.indices)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9))
def test_every_stream_has_as_many_requests(num_streams: int, each: int, num_processes: int) -> None:
    """A process with fewer streams and as many requests would run on alone at the end."""
    for part in shares(job(each * num_streams, num_streams), num_processes):
        assert len(part.indices) == each * len(part.streams)


def test_a_job_and_its_outcome_survive_the_pipe() -> None:
    for whole in (job(3, 2, 1), job(3)):
        assert job_of(orjson.loads(frame(whole).partition(b"\n")[2])) == whole
    record = Record(1, 2.0, stream=1, sent_s=2.5, arrivals=[(3.0, 1), (4.0, 3)], output_tokens=3)
    outcome = Outcome([record], cpu_s=0.5, wall_s=2.0, lags_s=[0.001])
    back = outcome_of(orjson.loads(frame(outcome).partition(b"\n")[2]))
    assert back.cpu_share == outcome.cpu_share == 0.25
    assert back.records[0].gaps_s() == record.gaps_s()
    assert back.lags_s == outcome.lags_s


@pytest.mark.parametrize(
    ("cores", "num_streams", "asked", "processes"),
    [
        (2, 256, 0, 1),
        (16, 1, 0, 1),
        (16, 32, 0, 1),
        (16, 33, 0, 2),
        (16, 256, 0, 4),
        (64, 256, 0, 8),
        (64, 0, 0, 4),
        (2, 0, 0, 1),
        (2, 256, 3, 3),
        (2, 2, 3, 2),
        (2, 0, 3, 3),
    ],
)
def test_as_many_processes_as_the_load_needs(
    monkeypatch: pytest.MonkeyPatch, cores: int, num_streams: int, asked: int, processes: int
) -> None:
    monkeypatch.setattr(fleet, "usable_cores", lambda: cores)
    assert num_clients(num_streams, asked) == processes
