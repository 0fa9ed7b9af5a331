"""Timestamps of requests -> TTFT, ITL, TPOT, tokens per second. Every formula of a report stands here.

client.Recorder --Record--> summarize() --> JSON, terminal

All times are seconds on one monotonic clock. A request's time starts when it was *due*, not when it was sent:
a generator that falls behind, or waits for a stalled server, must not hide the wait.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

PERCENTILES = (50, 95, 99)


@dataclass
class Record:
    """One request as it was seen from outside; `arrivals` pairs a time with the tokens received by then."""

    index: int
    scheduled_s: float
    sent_s: float = 0.0
    finished_s: float = 0.0  # the chunk with the finish reason
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0  # by the server's usage where it gives one
    counted_by: str = "chunks"  # server: every arrival's count is the server's own
    finish_reason: str = ""
    error: str = ""
    warmup: bool = False

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        """First token - scheduled."""
        return self.arrivals[0][0] - self.scheduled_s

    @property
    def e2e_s(self) -> float:
        """Finish - scheduled."""
        return self.finished_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """(E2E - TTFT) / (n - 1); None for one token, which has no second to wait for."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    def rebase(self, zero_s: float) -> None:
        """Count this record's times from `zero_s`."""
        self.scheduled_s -= zero_s
        self.sent_s -= zero_s
        self.finished_s -= zero_s if self.finished_s else 0.0
        self.arrivals = [(time_s - zero_s, tokens) for time_s, tokens in self.arrivals]

    def gaps_s(self) -> list[float]:
        """One gap for each token after the first arrival; a chunk of k tokens gives k gaps of a kth each."""
        gaps: list[float] = []
        for (before_s, count_before), (after_s, count_after) in pairwise(self.arrivals):
            tokens = count_after - count_before
            gaps.extend([(after_s - before_s) / tokens] * tokens)
        return gaps


def percentile(values: Sequence[float], percent: float) -> float:
    """Value below which `percent` of the sorted values lie, linear between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def describe(values: Iterable[float]) -> dict[str, float] | None:
    """values -> n, mean, p50, p95, p99, max; None where there are none."""
    known = list(values)
    if not known:
        return None
    result = {"n": len(known), "mean": sum(known) / len(known)}
    result |= {f"p{percent}": percentile(known, percent) for percent in PERCENTILES}
    return result | {"max": max(known)}


def summarize(records: Sequence[Record], output_tokens: int) -> dict[str, Any]:
    """Records of one run -> its figures. Warm-up is left out; errors are counted, and never timed.

    `output_tokens` is what each request asked for; fewer received makes it `short`.
    """
    measured = [record for record in records if not record.warmup]
    done = [record for record in measured if record.ok]
    start_s = min((record.scheduled_s for record in measured), default=0.0)
    window_s = max((record.finished_s for record in done), default=start_s) - start_s
    tokens = sum(record.output_tokens for record in done)
    return {
        "num_ok": len(done),
        "num_errors": len(measured) - len(done),
        "num_short": sum(record.output_tokens < output_tokens for record in done),
        "errors": dict(Counter(record.error for record in records if not record.ok)),
        "num_warmup_errors": sum(record.warmup and not record.ok for record in records),
        "window_s": window_s,
        "output_tokens": tokens,
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "output_tokens_per_s": tokens / window_s if window_s else 0.0,
        "requests_per_s": len(done) / window_s if window_s else 0.0,
        "ttft_s": describe(record.ttft_s for record in done),
        "itl_s": describe(gap for record in done for gap in record.gaps_s()),
        "tpot_s": describe(tpot for record in done if (tpot := record.tpot_s) is not None),
        "e2e_s": describe(record.e2e_s for record in done),
        "counted_by": sorted({record.counted_by for record in done}),
    }
