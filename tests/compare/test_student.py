"""Student's t against printed tables."""

import pytest

from service.compare.student import quantile, tail


@pytest.mark.parametrize(
    ("probability", "degrees", "wanted"),
    [
        (0.025, 1, 12.706),
        (0.025, 2, 4.303),
        (0.025, 3, 3.182),
        (0.025, 4, 2.776),
        (0.025, 30, 2.042),
        (0.0005, 4, 8.610),
        (0.0005, 5, 6.869),
        (0.005, 120, 2.617),
    ],
)
def test_quantiles_are_those_of_tables(probability: float, degrees: int, wanted: float) -> None:
    assert quantile(probability, degrees) == pytest.approx(wanted, abs=6e-4)
    assert tail(quantile(probability, degrees), degrees) == pytest.approx(probability, rel=1e-6)


def test_half_lies_on_either_side() -> None:
    assert [tail(0.0, degrees) for degrees in (1, 2, 7)] == [0.5, 0.5, 0.5]
