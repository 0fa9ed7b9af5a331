"""What was measured of speed, as types: runs, the intervals over them, and both at each level of load.

loads, statistics --Run, Figures--> Level --> report.Row

Times are seconds, energy joules. Intervals are at 95 % confidence over the repeats
(docs/compare.md).
"""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

CONFIDENCE = 0.95


def described(text: str) -> Meta:
    return Meta(description=text)


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """A figure and how sure it is. One repeat tells nothing of its spread: `low` and `high` are None then."""

    estimate: Annotated[float, described("Mean over the repeats; of a ratio: mode's mean / reference's mean")]
    low: Annotated[float | None, described("Lower end at 95 % confidence; null: one repeat has no spread")]
    high: Annotated[float | None, described("Upper end")]
    n: Annotated[int, described("Repeats it is made of")]

    def excludes(self, value: float) -> bool:
        """Is `value` beyond the interval? Never where there is none."""
        if self.low is None or self.high is None:
            return False
        return not self.low <= value <= self.high

    @property
    def half_width(self) -> float | None:
        """As a share of the estimate; None where there is no interval."""
        if self.low is None or self.high is None or not self.estimate:
            return None
        return (self.high - self.low) / 2 / abs(self.estimate)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Every figure of one level of load. In `Level.ratios` each is mode / reference: 1 is equal."""

    output_tokens_per_s: Interval | None = None
    requests_per_s: Interval | None = None
    goodput_per_s: Annotated[Interval | None, described("Requests/s that met the SLO")] = None
    ttft_p50_s: Annotated[Interval | None, described("First token - time the request was due")] = None
    ttft_p95_s: Interval | None = None
    ttft_p99_s: Interval | None = None
    itl_p50_s: Annotated[Interval | None, described("Gaps between tokens, all requests pooled")] = None
    itl_p95_s: Interval | None = None
    itl_p99_s: Interval | None = None
    tpot_p50_s: Annotated[Interval | None, described("(E2E - TTFT) / (tokens - 1) of each request")] = None
    tpot_p95_s: Interval | None = None
    tpot_p99_s: Interval | None = None
    e2e_p50_s: Annotated[Interval | None, described("Last event - time the request was due")] = None
    e2e_p95_s: Interval | None = None
    e2e_p99_s: Interval | None = None
    joules_per_output_token: Annotated[
        Interval | None, described("Energy of the device over the window / output tokens; null: not metered")
    ] = None
    joules_per_token: Annotated[Interval | None, described("The same by prompt and output tokens")] = None


FIGURES = Figures.__struct_fields__
HIGHER_IS_BETTER = frozenset({"output_tokens_per_s", "requests_per_s", "goodput_per_s"})


def effect(figure: str, ratio: Interval | None) -> Literal["better", "worse", "undecided"]:
    """What a ratio against the reference says: undecided where its interval holds 1, or there is none."""
    if ratio is None or not ratio.excludes(1.0):
        return "undecided"
    return "better" if (ratio.estimate > 1) is (figure in HIGHER_IS_BETTER) else "worse"


class Latency(msgspec.Struct, frozen=True):
    """Seconds. With fewer than 100 values p99 is close to the slowest of them."""

    n: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """By the device's own counter, over the window in which requests counted."""

    joules: float
    window_s: float
    idle_watts: Annotated[float, described("Power with the weights loaded and no request, before the load")]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One level of load, once, in one engine process."""

    repeat: Annotated[int, described("From 0; the same prompts and arrivals for every mode in it")]
    order: Annotated[int, described("Place of its engine in the schedule, from 0")]
    seed: int
    num_ok: int
    num_errors: int
    num_short: Annotated[int, described("Answers with fewer tokens than asked")]
    errors: dict[str, int]
    window_s: float
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: Annotated[float | None, described("Requests/s that met the SLO; null: no SLO")]
    ttft_s: Latency | None
    itl_s: Latency | None
    tpot_s: Latency | None
    e2e_s: Latency | None
    energy: Annotated[Energy | None, described("Null: this device has no counter")]
    client_cpu_share: Annotated[float, described("Of one core, taken by the load generator itself")]
    client_lag_p99_s: Annotated[float, described("How late the load generator woke up")]
    raw: Annotated[str, described("File beside the report with every request's timestamps")]
    disagreements: Annotated[
        list[str], described("Where the server's own counts and the generator's are more than 5 % apart")
    ] = []


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One level of load over all repeats: the same seeded requests for every mode."""

    id: Annotated[str, described("`closed-N`: N streams that each wait for their answer; `open-R`: Poisson")]
    concurrency: Annotated[int, described("Streams of a closed loop, 0 for an open one")]
    rate_per_s: Annotated[float, described("Requests/s of an open loop, 0 for a closed one")]
    num_requests: Annotated[int, described("That count, in each repeat")]
    num_warmup: int
    runs: list[Run]
    figures: Figures
    ratios: Annotated[
        Figures | None, described("Mode / reference, paired by repeat; null for the reference")
    ] = None
    itl_curve_s: Annotated[list[float], described("Quantiles 0, 2, 4, ... 100 % of all gaps")]

    @property
    def is_closed(self) -> bool:
        return self.concurrency > 0

    @property
    def label(self) -> str:
        if not self.is_closed:
            return f"{self.rate_per_s:g} requests/s"
        return f"{self.concurrency} stream{'s' if self.concurrency > 1 else ''}"

    @property
    def num_errors(self) -> int:
        return sum(run.num_errors for run in self.runs)

    @property
    def num_short(self) -> int:
        return sum(run.num_short for run in self.runs)
