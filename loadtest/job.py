"""One run of load as it is handed to one client process, and what comes back: JSON on both ways.

fleet --Job--> worker, worker --Outcome--> fleet

A frame is its length as a decimal line, then that many bytes of JSON.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from loadtest.statistics import Record
from loadtest.workload import Workload, workload_of


@dataclass(frozen=True)
class Job:
    """One process's share of one run. A closed loop has streams, an open one a time for each request."""

    url: str
    api_key: str
    timeout_s: float
    workload: Workload
    indices: tuple[int, ...]
    streams: tuple[int, ...] = ()
    due_s: tuple[float, ...] = ()  # after the start, one for each index
    num_warmup: int = 0  # requests with a lower index do not count


@dataclass
class Outcome:
    """What one process saw, on the clock that all processes of a machine share, and what it cost."""

    records: list[Record]
    cpu_s: float
    wall_s: float
    lags_s: list[float]

    @property
    def cpu_share(self) -> float:
        """Of one core."""
        return self.cpu_s / self.wall_s if self.wall_s else 0.0


def frame(message: Any) -> bytes:
    """A dataclass or a plain value -> the bytes of one frame."""
    body = orjson.dumps(message)
    return b"%d\n" % len(body) + body


def job_of(message: Mapping[str, Any]) -> Job:
    """The JSON of a Job -> the Job."""
    fields = dict(message)
    workload = workload_of(fields.pop("workload"))
    for name in ("indices", "streams", "due_s"):
        fields[name] = tuple(fields[name])
    return Job(workload=workload, **fields)


def outcome_of(message: Mapping[str, Any]) -> Outcome:
    """The JSON of an Outcome -> the Outcome."""
    fields = dict(message)
    records = [Record(**record) for record in fields.pop("records")]
    return Outcome(records=records, **fields)


def shares(job: Job, num_clients: int) -> list[Job]:
    """A whole run -> each process's share of it: streams and their requests in turn, arrivals in turn.

    A closed loop's requests follow its streams, so that each process has as many a stream as the others.
    """
    groups = len(job.streams) or num_clients
    parts = []
    for client in range(min(num_clients, groups)):
        places = [place for place in range(len(job.indices)) if place % groups % num_clients == client]
        parts.append(
            dataclasses.replace(
                job,
                indices=tuple(job.indices[place] for place in places),
                streams=job.streams[client::num_clients],
                due_s=tuple(job.due_s[place] for place in places) if job.due_s else (),
            )
        )
    return parts
