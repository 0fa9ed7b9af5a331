"""The numbers of one precision.

Own counters instead of prometheus_client's: a step adds n equal observations in one call, and takes no lock,
for everything runs on the event loop.
"""

from bisect import bisect_left
from collections.abc import Mapping

from service.messages import ERROR_KINDS
from service.metrics.catalogue import FAMILIES, FINISH_REASONS, SWAP_OUTCOMES, TOKEN_KINDS

Labels = tuple[str, ...]  # values, in the order of the family's own label names

GAUGES = frozenset(family.name for family in FAMILIES if family.type == "gauge")
BOUNDS = {family.name: family.bounds for family in FAMILIES if family.type == "histogram"}
# without a GPU, or before an evaluation, there is no such figure, and a 0 would be one
ABSENT_UNTIL_SET = frozenset(
    {
        "halftone_energy_joules_total",
        "halftone_power_watts",
        "halftone_quality_divergence_nats",
        "halftone_quality_agreement_ratio",
    }
)


class Histogram:
    """Counts of observations in (previous bound, bound]; the last count is above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def cumulative(self) -> list[tuple[str, int]]:
        """(le, observations up to it), as Prometheus wants them."""
        total = 0
        buckets = []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets

    def merge(self, other: "Histogram") -> None:
        """Adds the other's observations; its bounds are the same."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Counts:
    """Every series of one model in one precision."""

    def __init__(self, model: str, precision: str) -> None:
        self.model = model
        self.precision = precision
        self.scalars: dict[str, dict[Labels, float]] = {}
        self.histograms: dict[str, dict[Labels, Histogram]] = {}
        for family in FAMILIES:
            if family.type == "histogram":
                self.histograms[family.name] = {} if family.labels else {(): Histogram(family.bounds)}
            else:
                is_absent = family.labels or family.name in ABSENT_UNTIL_SET
                self.scalars[family.name] = {} if is_absent else {(): 0.0}
        for kind in TOKEN_KINDS:
            self.set("halftone_tokens_total", 0, kind)
        for reason in FINISH_REASONS:
            self.set("halftone_requests_total", 0, reason)
        for outcome in SWAP_OUTCOMES:
            self.set("halftone_precision_swaps_total", 0, outcome)
        for kind in sorted(set(ERROR_KINDS.values())):
            self.set("halftone_request_errors_total", 0, kind)
        self.set("halftone_requests_rejected_total", 0, "overloaded")

    @property
    def common(self) -> Labels:
        """Values of the labels that every series carries."""
        return self.model, self.precision

    def add(self, name: str, amount: float, *labels: str) -> None:
        series = self.scalars[name]
        series[labels] = series.get(labels, 0.0) + amount

    def set(self, name: str, value: float, *labels: str) -> None:
        self.scalars[name][labels] = float(value)

    def replace(self, name: str, values: Mapping[str, float]) -> None:
        """All series of a family with one label: its value -> the number."""
        self.scalars[name] = {(label,): float(value) for label, value in values.items()}

    def histogram(self, name: str, *labels: str) -> Histogram:
        series = self.histograms[name]
        if labels not in series:
            series[labels] = Histogram(BOUNDS[name])
        return series[labels]

    def forget_gauges(self) -> None:
        """This precision is served no more: what was counted stands, what was so now is gone."""
        for name in GAUGES:
            self.scalars[name] = {}
