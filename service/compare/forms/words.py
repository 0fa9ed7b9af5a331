"""Numbers as people read them: sizes, times, and a ratio as a change with its interval.

report figures --> here --> tables, page, terminal
"""

from dataclasses import dataclass

from service.compare.figures import Interval

NOTHING = "–"
MINUS = "−"
UNTOLD = "~"  # before a change that cannot be told from none
SIGNS = {"better": " ✓", "worse": " ✗"}  # behind one that is established: grey paper has no green and red


@dataclass(frozen=True)
class Unit:
    """What a value in base units is divided by to be read, and its name."""

    divisor: float
    name: str


MILLISECONDS = Unit(1e-3, "ms")
PLAIN = Unit(1.0, "")


def size_unit(largest_bytes: float) -> Unit:
    """One for a whole column: sizes are there to be compared."""
    return Unit(1e9, "GB") if largest_bytes >= 2e9 else Unit(1e6, "MB")


def amount(value: float) -> str:
    """Three digits that count: 1,240, 41.3, 0.0273."""
    if value and abs(value) < 5e-5:
        return f"{value:.1e}".replace("-", MINUS)
    if abs(value) >= 99.95:
        return f"{value:,.0f}".replace("-", MINUS)
    places = next(n for n, least in ((1, 9.995), (2, 0.9995), (3, 0.09995), (4, 0.0)) if abs(value) >= least)
    return f"{value:.{places}f}".replace("-", MINUS)


def measured(value: float | None, unit: Unit = PLAIN) -> str:
    return NOTHING if value is None else amount(value / unit.divisor)


def estimated(interval: Interval | None, unit: Unit = PLAIN) -> str:
    """Without its ends: those of the change stand beside it."""
    return measured(interval.estimate if interval else None, unit)


def signed(percent: float) -> str:
    """`+31`, `−2.4`, `0.0`."""
    written = f"{percent:+.0f}" if abs(percent) >= 9.95 else f"{percent:+.1f}"
    return written.replace("-", MINUS)


def percent_of(ratio: float) -> float:
    """1.31 -> 31."""
    return 100 * (ratio - 1)


def change(ratio: Interval | None) -> str:
    """`+31 %`; `~ +1.2 %` where it may as well be none."""
    if ratio is None:
        return ""
    said = f"{signed(percent_of(ratio.estimate))} %"
    return said if ratio.excludes(1.0) else f"{UNTOLD} {said}"


def ends(ratio: Interval | None) -> str:
    """`+28 to +34`, percent; of one run there are none."""
    if ratio is None:
        return ""
    if ratio.low is None or ratio.high is None:
        return "one run"
    return f"{signed(percent_of(ratio.low))} to {signed(percent_of(ratio.high))}"


def exact_change(value: float, base: float) -> str:
    """Of counted bytes, which have no noise."""
    if value == base:
        return "same"
    return f"{signed(percent_of(value / base))} %" if base else ""
