"""One load: how many streams, or when requests come.

__main__ --Level--> bench --due_s()--> Job
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

REQUESTS_PER_STREAM = 4
LEAST_REQUESTS = 16
OPEN_LOOP_S = 30  # as much load as it takes to see a queue build up
LEAST_OPEN_REQUESTS = 32

Kind = Literal["closed", "poisson", "constant", "trace"]


@dataclass(frozen=True)
class Level:
    """Streams that wait for their answers (closed), or requests at times of their own, however many are open.

    A trace has the times of its recording, `speed` times as fast.
    """

    kind: Kind
    concurrency: int = 0  # of a closed loop
    rate_per_s: float = 0.0  # of Poisson and constant arrivals
    recorded_s: Sequence[float] = ()  # of a trace: when its requests came, from 0 on
    speed: float = 1.0

    @property
    def label(self) -> str:
        if self.kind == "closed":
            return f"{self.concurrency} stream{'s' if self.concurrency > 1 else ''}"
        if self.kind == "trace":
            return "trace" if self.speed == 1 else f"trace x{self.speed:g}"
        return f"{self.rate_per_s:g} requests/s" + (", even" if self.kind == "constant" else "")

    @property
    def arrivals(self) -> dict[str, Any]:
        """What the JSON says of it."""
        if self.kind == "closed":
            return {"kind": self.kind, "concurrency": self.concurrency}
        if self.kind == "trace":
            return {"kind": self.kind, "speed": self.speed, "recorded_s": self.recorded_s[-1]}
        return {"kind": self.kind, "rate_per_s": self.rate_per_s}

    def counts(self, num_requests: int | None, num_warmup: int | None) -> tuple[int, int]:
        """What was asked for, None where nothing was -> (requests that count, warm-up before them).

        Warm-up is one request for each stream; in an open loop the first that come, which find no queue.
        """
        if self.kind == "closed":
            requests = max(LEAST_REQUESTS, REQUESTS_PER_STREAM * self.concurrency)
            warmup = self.concurrency
        elif self.kind == "trace":
            second = sum(recorded_s < self.speed for recorded_s in self.recorded_s)
            warmup = min(second, LEAST_OPEN_REQUESTS, len(self.recorded_s) - 1)
            warmup = warmup if num_warmup is None else num_warmup
            requests = len(self.recorded_s) - warmup
        else:
            requests = max(LEAST_OPEN_REQUESTS, round(OPEN_LOOP_S * self.rate_per_s))
            warmup = min(LEAST_OPEN_REQUESTS, max(2, round(self.rate_per_s)))
        return (
            requests if num_requests is None else num_requests,
            warmup if num_warmup is None else num_warmup,
        )

    def due_s(self, num_requests: int, seed: int) -> tuple[float, ...]:
        """Seconds after the start at which an open loop's requests are due; none in a closed one."""
        if self.kind == "closed":
            return ()
        if self.kind == "trace":
            return tuple(recorded_s / self.speed for recorded_s in self.recorded_s[:num_requests])
        if self.kind == "constant":
            return tuple(number / self.rate_per_s for number in range(num_requests))
        return tuple(poisson_arrivals(num_requests, self.rate_per_s, seed))


def poisson_arrivals(num_requests: int, rate_per_s: float, seed: int) -> list[float]:
    """Seconds after the start at which requests are due; gaps are exponential with mean 1 / rate.

    The seed draws gaps of mean one that the rate only scales: two rates run the same pattern.
    """
    draw = random.Random(f"{seed}:arrivals")
    due_s, arrivals = 0.0, []
    for _ in range(num_requests):
        arrivals.append(due_s)
        due_s += draw.expovariate(1.0) / rate_per_s
    return arrivals
