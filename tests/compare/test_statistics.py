"""Intervals by hand, and by many simulated comparisons whose truth is known."""

from collections.abc import Sequence

import numpy as np
import pytest

from service.compare.figures import Interval
from service.compare.statistics import (
    MAX_BINS,
    Counts,
    Sample,
    drawn_counts,
    estimate,
    over_runs,
    ratio,
    requests_error,
    resolves,
    weighted,
)

REQUESTS = 16


def whole(*values: float) -> list[Sample]:
    return [Sample.whole(value) for value in values]


def counts(num_repeats: int) -> list[Counts]:
    return drawn_counts(REQUESTS, num_repeats, 0)


def test_an_interval_by_hand() -> None:
    """s = 1, n = 3: 1 / sqrt(3) times Student's t of 2 degrees, 4.3027."""
    found = estimate(whole(9.0, 10.0, 11.0), counts(3))
    assert found.estimate == 10
    assert found.n == 3
    assert found.low == pytest.approx(10 - 4.30265 / 3**0.5, abs=1e-4)
    assert found.high == pytest.approx(10 + 4.30265 / 3**0.5, abs=1e-4)
    assert found == over_runs([9.0, 10.0, 11.0])


def test_a_ratio_is_paired_by_repeat() -> None:
    """A repeat in which the machine was twice as slow says nothing about the modes."""
    found = ratio(whole(11.0, 22.0, 11.11), whole(10.0, 20.0, 10.0), counts(3))
    assert found is not None
    assert found.estimate == pytest.approx(44.11 / 40)
    assert found.low is not None
    assert found.low > 1.08
    unpaired = ratio(whole(22.0, 11.0, 11.11), whole(10.0, 20.0, 10.0), counts(3))
    assert unpaired is not None
    assert not unpaired.excludes(1.0)


def test_one_repeat_has_no_spread_and_nothing_divides_by_zero() -> None:
    assert estimate(whole(5.0), counts(1)) == Interval(estimate=5.0, low=None, high=None, n=1)
    alone = ratio(whole(5.0), whole(4.0), counts(1))
    assert alone == Interval(estimate=1.25, low=None, high=None, n=1)
    assert not alone.excludes(1.0)
    assert ratio(whole(5.0, 5.0), whole(0.0, 0.0), counts(2)) is None
    assert not resolves(alone)


def test_runs_that_came_out_alike_by_luck_do_not_hide_the_chance_in_requests() -> None:
    draw = np.random.default_rng(1)
    values = draw.lognormal(0, 0.5, REQUESTS)
    samples = [Sample.of(values, range(REQUESTS), None) for _ in range(3)]
    found = estimate(samples, counts(3))
    assert found.half_width is not None
    assert found.half_width > 4 * values.std() / (3 * REQUESTS) ** 0.5 * 0.8 / values.mean()


def test_weighted_percentiles_are_those_of_repeated_values() -> None:
    draw = np.random.default_rng(0)
    values = np.sort(draw.random(30))
    weights = draw.integers(0, 4, (20, 30))
    for percent in (0.0, 50.0, 95.0, 99.0, 100.0):
        wanted = [np.percentile(np.repeat(values, row), percent) for row in weights]
        assert weighted(values, weights, percent) == pytest.approx(wanted)
    assert weighted(values, weights, None) == pytest.approx(
        [np.repeat(values, row).mean() for row in weights]
    )
    assert weighted(values, np.zeros((1, 30), dtype=np.int64), 50.0) == pytest.approx([np.median(values)])


def test_many_values_are_resampled_as_bins_with_the_same_error() -> None:
    draw = np.random.default_rng(0)
    gaps = draw.lognormal(0, 0.3, (REQUESTS, 200)) * draw.lognormal(0, 0.2, (REQUESTS, 1))
    sample = Sample.of(gaps.ravel(), np.repeat(np.arange(REQUESTS), 200), 95.0)
    assert len(sample.values) > MAX_BINS
    (drawn,) = counts(1)
    exact = weighted(sample.values, drawn[:, sample.requests], 95.0)
    assert requests_error([sample.resampled(drawn)]) == pytest.approx(requests_error([exact]), rel=0.02)


class Machine:
    """Runs with what varies on a real one: engine to engine, repeat to repeat, request to request."""

    def __init__(self, run_noise: float, seed: int) -> None:
        self.draw, self.run_noise = np.random.default_rng(seed), run_noise

    def compared(self, slowness: float, percent: float | None, least: int = 3, most: int = 8) -> Interval:
        """TTFT-like figures of a mode against a reference; repeats are added as `compare` adds them."""
        prompts = self.draw.lognormal(0, 0.3, (most, REQUESTS)) * self.draw.lognormal(0, 0.05, (most, 1))
        mode, reference = (self.runs(prompts, speed, percent) for speed in (slowness, 1.0))
        for n in range(least, most + 1):
            found = ratio(mode[:n], reference[:n], counts(most)[:n])
            assert found is not None
            if resolves(found):
                break
        return found

    def runs(self, prompts: np.ndarray, slowness: float, percent: float | None) -> Sequence[Sample]:
        engines = self.draw.lognormal(0, self.run_noise, (len(prompts), 1))
        times = slowness * prompts * engines * self.draw.lognormal(0, 0.01, prompts.shape)
        return [Sample.of(row, range(REQUESTS), percent) for row in times]


@pytest.mark.parametrize(
    ("run_noise", "percent"),
    [(0.003, 95.0), (0.01, None), (0.02, 50.0)],
    ids=["0.3%-p95", "1%-mean", "2%-p50"],
)
def test_the_null_comparison_shows_no_difference_and_five_percent_are_found(
    run_noise: float, percent: float | None
) -> None:
    """Of 100 comparisons of a thing with itself at most 10 may say that it differs: with a rate of 5 % more
    would come in one of 100 such tests. A slowdown of 5 % is found in nearly all, on a machine that resolves
    it."""
    machine = Machine(run_noise, seed=7)
    false = sum(machine.compared(1.0, percent).excludes(1.0) for _ in range(100))
    assert false <= 10
    found = [machine.compared(1.05, percent) for _ in range(100)]
    assert sum(one.excludes(1.0) and one.estimate > 1 for one in found) >= (95 if run_noise <= 0.01 else 85)
