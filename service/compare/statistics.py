"""Repeats of one figure -> an interval, alone and against the reference. Numbers in, numbers out.

levels --Samples of each repeat--> estimate(), ratio() --Interval--> Figures

Two things vary: engines (one process is a little faster than the next) and requests. Runs are resampled
first: the mean of n runs has the standard error s / sqrt(n), which is what a bootstrap over runs converges
to once its shrinking by (n - 1) / n is undone, and needs no drawing. It already holds the chance in the
requests; but three runs can come out alike by luck, so the requests within each run are resampled too, and
the larger error counts. It is multiplied with Student's t of n - 1 degrees of freedom, because a bootstrap
of three runs as it is holds the truth in 75 %. A ratio pairs both modes repeat by repeat and
request by request: they had the same prompts at the same times, so what was slow in the workload or the
machine in that repeat is slow in both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.compare.figures import CONFIDENCE, Interval
from service.compare.student import quantile

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

DRAWS = 200
MAX_BINS = 512  # values beyond as many are resampled as quantiles of them; the estimate takes all
RESOLUTION = 0.05


def student_t(degrees: int) -> float:
    """How many standard errors a two-sided interval reaches to each side."""
    return quantile((1 - CONFIDENCE) / 2, degrees)


@dataclass(frozen=True)
class Sample:
    """One repeat's values of one figure, and the request that each is of.

    The figure is the percentile `percent` of the values, or their mean where that is None. A figure that is
    no request's own, such as tokens/s, is one value of request -1, which resampling leaves alone.
    """

    values: Floats
    requests: Counts
    percent: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], requests: Sequence[int], percent: float | None) -> "Sample":
        order = np.argsort(np.asarray(values, dtype=np.float64), kind="stable")
        return cls(
            np.asarray(values, dtype=np.float64)[order],
            np.asarray(requests, dtype=np.int64)[order],
            percent,
        )

    @classmethod
    def whole(cls, value: float) -> "Sample":
        """A figure of the run as such."""
        return cls(np.array([value]), np.array([-1]))

    def figure(self) -> float:
        if self.percent is None:
            return float(self.values.mean())
        return float(np.percentile(self.values, self.percent))

    def resampled(self, counts: Counts) -> Floats:
        """How often each request was drawn, [draws, requests] -> the figure of each draw, [draws]."""
        if self.requests[0] < 0:
            return np.full(len(counts), self.values[0])
        values, requests = self.values, self.requests
        if len(values) > MAX_BINS:
            return self._resampled_by_bins(counts)
        weights = counts[:, requests]
        return weighted(values, weights, self.percent)

    def _resampled_by_bins(self, counts: Counts) -> Floats:
        """As `resampled`, with neighbouring values counted as their mean: one small product instead of a
        sort."""
        bins = np.arange(len(self.values)) * MAX_BINS // len(self.values)
        of_request = np.zeros((counts.shape[1], MAX_BINS))
        np.add.at(of_request, (self.requests, bins), 1.0)
        means = np.bincount(bins, self.values) / np.bincount(bins)
        return weighted(means, (counts @ of_request).astype(np.int64), self.percent)


def weighted(values: Floats, weights: Counts, percent: float | None) -> Floats:
    """Sorted values [n], how often each is there [draws, n] -> mean or percentile of each draw [draws].

    A draw that holds none of the values, because it drew failed requests alone, has the figure of all.
    """
    total = weights.sum(axis=1)
    weights = np.where(total[:, None] > 0, weights, 1)
    total = weights.sum(axis=1)
    if percent is None:
        return (weights @ values) / total
    reached = np.cumsum(weights, axis=1)
    place = (total - 1) * percent / 100
    low = np.floor(place).astype(np.int64)
    below = values[(reached <= low[:, None]).sum(axis=1)]
    above = values[(reached <= np.minimum(low + 1, total - 1)[:, None]).sum(axis=1)]
    return below + (above - below) * (place - low)


def drawn_counts(num_requests: int, num_repeats: int, seed: int) -> list[Counts]:
    """How often each request is drawn, [draws, requests] for each repeat: the same for every mode and
    figure."""
    generator = np.random.default_rng(seed)
    equal = np.full(num_requests, 1 / num_requests)
    return [generator.multinomial(num_requests, equal, size=DRAWS) for _ in range(num_repeats)]


def estimate(samples: Sequence[Sample], counts: Sequence[Counts]) -> Interval:
    """One figure of one mode over its repeats."""
    means = np.array([sample.figure() for sample in samples])
    if len(samples) < 2:
        return alone(float(means[0]), len(samples))
    drawn = [sample.resampled(count) for sample, count in zip(samples, counts, strict=True)]
    error = max(runs_error(means), requests_error(drawn))
    return around(float(means.mean()), error, len(samples))


def ratio(
    samples: Sequence[Sample], reference: Sequence[Sample], counts: Sequence[Counts]
) -> Interval | None:
    """mean(mode) / mean(reference), the i-th sample of both from the same repeat; None where that is x /
    0."""
    mode = np.array([sample.figure() for sample in samples])
    base = np.array([sample.figure() for sample in reference])
    if not base.mean():
        return None
    value = float(mode.mean() / base.mean())
    if len(samples) < 2:
        return alone(value, len(samples))
    # what a repeat adds to mode - value * reference is what it adds to the ratio, to first order
    drawn = [
        (one.resampled(count) - value * other.resampled(count)) / base.mean()
        for one, other, count in zip(samples, reference, counts, strict=True)
    ]
    error = max(runs_error((mode - value * base) / base.mean()), requests_error(drawn))
    return around(value, error, len(samples))


def over_runs(values: Sequence[float]) -> Interval:
    """A figure that has nothing to do with requests, such as seconds of loading."""
    figures = np.array(values)
    if len(values) < 2:
        return alone(float(figures[0]), len(values))
    return around(float(figures.mean()), runs_error(figures), len(values))


def runs_error(figures: Floats) -> float:
    """Standard error of the mean of n >= 2 runs."""
    return float(figures.std(ddof=1)) / math.sqrt(len(figures))


def requests_error(drawn: Sequence[Floats]) -> float:
    """The same from requests resampled within each run: [draws] of each."""
    return float(np.std(np.mean(drawn, axis=0), ddof=1))


def alone(value: float, n: int) -> Interval:
    return Interval(estimate=value, low=None, high=None, n=n)


def around(value: float, standard_error: float, n: int) -> Interval:
    """No figure here is below 0."""
    reach = student_t(n - 1) * standard_error
    return Interval(estimate=value, low=max(0.0, value - reach), high=value + reach, n=n)


def resolves(found: Interval | None) -> bool:
    """Is a ratio known well enough that a difference of 5 % would not be missed, nor noise taken for one?"""
    half_width = found.half_width if found else None
    return half_width is not None and half_width <= RESOLUTION / 2
