"""When requests of each kind of load are due, and how many there are."""

from itertools import pairwise

import pytest

from loadtest.level import Level, poisson_arrivals


def test_arrivals_are_poisson_seeded_and_scale_with_the_rate() -> None:
    slow, fast = poisson_arrivals(4000, 2.0, seed=1), poisson_arrivals(4000, 8.0, seed=1)
    assert slow == poisson_arrivals(4000, 2.0, seed=1)
    assert slow != poisson_arrivals(4000, 2.0, seed=2)
    assert fast == pytest.approx([due_s / 4 for due_s in slow])
    gaps = [b - a for a, b in pairwise(slow)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(0.5, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.05)  # an exponential's standard deviation is its mean


def test_constant_arrivals_are_even_whatever_the_seed() -> None:
    level = Level("constant", rate_per_s=4)
    assert level.due_s(4, seed=1) == level.due_s(4, seed=2) == (0, 0.25, 0.5, 0.75)
    assert level.label == "4 requests/s, even"


def test_a_trace_is_replayed_at_its_speed() -> None:
    level = Level("trace", recorded_s=(0.0, 1.0, 6.0), speed=2)
    assert level.due_s(3, seed=1) == (0, 0.5, 3)
    assert level.label == "trace x2"
    assert level.arrivals == {"kind": "trace", "speed": 2, "recorded_s": 6.0}


def test_a_closed_loop_has_no_times() -> None:
    assert Level("closed", concurrency=4).due_s(9, seed=1) == ()


@pytest.mark.parametrize(
    ("level", "asked", "counts"),
    [
        (Level("closed", concurrency=1), (None, None), (16, 1)),
        (Level("closed", concurrency=256), (None, None), (1024, 256)),
        (Level("poisson", rate_per_s=0.5), (None, None), (32, 2)),
        (Level("constant", rate_per_s=8), (None, None), (240, 8)),
        (Level("poisson", rate_per_s=8), (5, 0), (5, 0)),
        (Level("trace", recorded_s=(0, 0.5, 1.5, 2.5)), (None, None), (2, 2)),  # the first second warms up
        (Level("trace", recorded_s=(0, 0.5, 1.5, 2.5)), (None, 0), (4, 0)),
        (Level("trace", recorded_s=(0, 0.5, 1.5, 2.5), speed=9), (None, None), (1, 3)),
        (Level("trace", recorded_s=(0,)), (None, None), (1, 0)),
        (Level("trace", recorded_s=(0, 0.5, 1.5, 2.5)), (1, 1), (1, 1)),
    ],
)
def test_as_many_requests_as_asked_or_as_the_load_needs(
    level: Level, asked: tuple[int | None, int | None], counts: tuple[int, int]
) -> None:
    assert level.counts(*asked) == counts
