"""Timestamps of requests -> TTFT, ITL, TPOT, tokens per second. Every formula of a report stands here.

client.Recorder --Record--> summarize(), pool() --> JSON, terminal

All times are seconds on one monotonic clock. A request's time starts when it was *due*, not when it was sent:
a generator that falls behind, or waits for a stalled server, must not hide the wait.
"""

import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

FORMULAS = {
    "TTFT": "t_1 - due",
    "E2E": "end - due",
    "TPOT": "(E2E - TTFT) / (n - 1)",
    "ITL": "(t_i - t_(i-1)) / (c_i - c_(i-1)), counted c_i - c_(i-1) times",
    "output tokens/s": "sum of n / (last end - first due)",
    "goodput": "requests with every figure within its limit (ITL: its p95) / (last end - first due)",
    "all busy tokens/s": "tokens that came while every stream was busy / seconds of it",
}
SYMBOLS = (
    "due: the scheduled time (closed loop: when the stream was free); t_i: arrival of the i-th event with "
    "tokens; c_i: tokens received by then; end: arrival of the event with the finish reason; n: the answer's "
    "tokens by the server's `usage`"
)
PERCENTILES = (50.0, 95.0, 99.0)
TAIL_PERCENTILES = (*PERCENTILES, 99.9)
MOST_PAUSES = 5


@dataclass
class Record:
    """One request as it was seen from outside; `arrivals` pairs a time with the tokens received by then."""

    index: int
    scheduled_s: float
    stream: int = -1  # of a closed loop; -1 in an open one
    sent_s: float = 0.0
    connected_s: float = 0.0  # 0 where no connection was made
    asked_tokens: int = 0  # the most that it may be answered with
    finished_s: float = 0.0  # the event with the finish reason, or when an error ended it
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, by the server's usage: what a prefix cache spared
    output_tokens: int = 0  # by the server's usage where it gives one
    counted_by: str = "events"  # who counted: `server` each event, `usage` the answer, `events` nobody did
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
        self.connected_s -= zero_s if self.connected_s else 0.0
        self.finished_s -= zero_s
        self.arrivals = [(time_s - zero_s, tokens) for time_s, tokens in self.arrivals]

    @property
    def is_short(self) -> bool:
        """Whether it ended before as many tokens as were asked for."""
        return self.output_tokens < self.asked_tokens

    def gaps_s(self) -> list[float]:
        """One gap for each token after the first arrival; an event of k tokens gives k gaps of a kth each."""
        gaps: list[float] = []
        for (before_s, count_before), (after_s, count_after) in pairwise(self.arrivals):
            tokens = count_after - count_before
            gaps.extend([(after_s - before_s) / tokens] * tokens)
        return gaps

    def tokens_by(self, time_s: float) -> float:
        """Tokens received up to `time_s`; where only the total is known, every event brought as many."""
        place = bisect_right(self.arrivals, time_s, key=lambda arrival: arrival[0])
        if not place:
            return 0.0
        return self.arrivals[place - 1][1] * self.output_tokens / self.arrivals[-1][1]


def percentile(values: Sequence[float], percent: float) -> float:
    """Value below which `percent` of the values lie, linear between neighbours."""
    return _percentile_of_sorted(sorted(values), percent)


def _percentile_of_sorted(ordered: Sequence[float], percent: float) -> float:
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def describe(values: Iterable[float], percents: Sequence[float] = PERCENTILES) -> dict[str, float] | None:
    """values -> n, mean, p50, p95, ..., max; None where there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    result = {"n": len(ordered), "mean": sum(ordered) / len(ordered)}
    result |= {f"p{percent:g}": _percentile_of_sorted(ordered, percent) for percent in percents}
    return result | {"max": ordered[-1]}


def latencies(done: Sequence[Record]) -> dict[str, Any]:
    """Answered requests -> the four latencies, each described."""
    return {
        "ttft_s": describe(record.ttft_s for record in done),
        "itl_s": describe((gap for record in done for gap in record.gaps_s()), TAIL_PERCENTILES),
        "tpot_s": describe(tpot for record in done if (tpot := record.tpot_s) is not None),
        "e2e_s": describe(record.e2e_s for record in done),
    }


def all_busy(measured: Sequence[Record]) -> dict[str, float] | None:
    """A closed loop's window in which every stream had a request open: from when the last stream sent its
    first, to when the first stream ended its last. None in an open loop, or where there is no such time."""
    streams: dict[int, tuple[float, float]] = {}
    for record in measured:
        if record.stream < 0:
            return None
        first_s, last_s = streams.get(record.stream, (record.sent_s, record.finished_s))
        streams[record.stream] = min(first_s, record.sent_s), max(last_s, record.finished_s)
    start_s = max((first_s for first_s, _ in streams.values()), default=0.0)
    end_s = min((last_s for _, last_s in streams.values()), default=0.0)
    if end_s <= start_s:
        return None
    done = [record for record in measured if record.ok]
    tokens = sum(record.tokens_by(end_s) - record.tokens_by(start_s) for record in done)
    return {
        "window_s": end_s - start_s,
        "output_tokens": tokens,
        "output_tokens_per_s": tokens / (end_s - start_s),
    }


def pauses(done: Sequence[Record], most: int = MOST_PAUSES) -> list[dict[str, float]]:
    """The longest times in which nobody got anything while two answers or more were on their way.

    -> seconds, when each began, and of how many answers; the longest first. One of them is one gap of as many
    streams at once, so that in a short run it alone can be what the last percentiles of ITL show.
    """
    answers = sorted((record.arrivals[0][0], record.arrivals[-1][0]) for record in done if record.arrivals)
    starts_s = [start_s for start_s, _ in answers]
    ends_s = sorted(end_s for _, end_s in answers)
    arrivals_s = sorted(time_s for record in done for time_s, _ in record.arrivals)
    found: list[dict[str, float]] = []
    for seconds, start_s in sorted(
        ((after_s - before_s, before_s) for before_s, after_s in pairwise(arrivals_s)), reverse=True
    ):
        # begun by then, less those that had their last by then
        num_answers = bisect_right(starts_s, start_s) - bisect_right(ends_s, start_s)
        if seconds and num_answers >= 2:
            found.append({"seconds": seconds, "start_s": start_s, "num_answers": num_answers})
        if len(found) == most:
            break
    return found


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Records of one run -> its figures. Warm-up is left out; errors are counted, and never timed."""
    measured = [record for record in records if not record.warmup]
    done = [record for record in measured if record.ok]
    start_s = min((record.scheduled_s for record in measured), default=0.0)
    window_s = max((record.finished_s for record in done), default=start_s) - start_s
    tokens = sum(record.output_tokens for record in done)
    num_events = sum(len(record.arrivals) for record in done)
    return {
        "num_ok": len(done),
        "num_errors": len(measured) - len(done),
        "num_short": sum(record.is_short for record in done),
        "errors": dict(Counter(record.error for record in records if not record.ok)),
        "num_warmup_errors": sum(record.warmup and not record.ok for record in records),
        "window_s": window_s,
        "output_tokens": tokens,
        "prompt_tokens": sum(record.prompt_tokens for record in done),
        "cached_tokens": sum(record.cached_tokens for record in done),
        "output_tokens_per_s": tokens / window_s if window_s else 0.0,
        "requests_per_s": len(done) / window_s if window_s else 0.0,
        "all_busy": all_busy(measured),
        **latencies(done),
        "pauses": pauses(done),
        "counted_by": sorted({record.counted_by for record in done}),
        "tokens_per_event": tokens / num_events if num_events else 0.0,
    }


def pool(runs: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Records of each repeat -> one level's figures: latencies over the requests of all repeats together,
    rates as the median of the repeats with the least and the most."""
    summaries = [summarize(records) for records in runs]
    done = [record for records in runs for record in records if record.ok and not record.warmup]

    def rate(read: Callable[[dict[str, Any]], float | None]) -> dict[str, float] | None:
        values = [value for summary in summaries if (value := read(summary)) is not None]
        if not values:
            return None
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    errors: Counter[str] = Counter()
    for summary in summaries:
        errors.update(summary["errors"])
    counts = ("num_ok", "num_errors", "num_short", "num_warmup_errors", "output_tokens", "prompt_tokens")
    return {
        **{name: sum(summary[name] for summary in summaries) for name in (*counts, "cached_tokens")},
        "errors": dict(errors),
        "output_tokens_per_s": rate(lambda summary: summary["output_tokens_per_s"]),
        "requests_per_s": rate(lambda summary: summary["requests_per_s"]),
        "all_busy_tokens_per_s": rate(lambda summary: (summary["all_busy"] or {}).get("output_tokens_per_s")),
        **latencies(done),
        "longest_pause": max(
            (pause for summary in summaries for pause in summary["pauses"]),
            key=lambda pause: pause["seconds"],
            default=None,
        ),
        "counted_by": sorted({record.counted_by for record in done}),
        "tokens_per_event": sum(record.output_tokens for record in done)
        / max(1, sum(len(record.arrivals) for record in done)),
    }
