"""Levels with intervals -> knee, crossover, Pareto front, and what the null comparison shows.

assemble --Rows, ratio of any two--> knee(), crossover(), front(), null_comparison() --> report.Row
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import exp, log

from service.compare.figures import CONFIDENCE, FIGURES, Interval, Level, effect
from service.compare.report import Crossover, Knee, NullComparison, Row

KNEE_FACTOR = 2.0
TOO_MANY = 2.0  # times what chance gives: ratios of one run move together, so that some more mean little
SPEED = "output_tokens_per_s"

Ratio = Callable[[Row, Row, str, str], Interval | None]  # a / b of a figure at a level, paired by repeat


def knee(levels: Sequence[Level]) -> Knee | None:
    """None without a level of one stream, or without rates."""
    unloaded = next((level.figures.ttft_p95_s for level in levels if level.concurrency == 1), None)
    rated = [
        (level.rate_per_s, found)
        for level in sorted(levels, key=lambda level: level.rate_per_s)
        if not level.is_closed and (found := level.figures.ttft_p95_s)
    ]
    if unloaded is None or not rated:
        return None
    limit_s = KNEE_FACTOR * unloaded.estimate
    rate, low, high = (
        highest([(per_s, end(found)) for per_s, found in rated], limit_s)
        for end in (
            lambda found: found.estimate,
            lambda found: found.estimate if found.high is None else found.high,
            lambda found: found.estimate if found.low is None else found.low,
        )
    )
    top = rated[-1][0]
    unloaded_ms = f"the {1e3 * unloaded.estimate:.0f} ms of one stream"
    if rate == top:
        said = f"p95 TTFT stays within twice {unloaded_ms} at every rate measured, up to {top:g} requests/s"
    elif rate:
        said = f"p95 TTFT stays within twice {unloaded_ms} up to {rate:g} requests/s"
    else:
        said = f"p95 TTFT is beyond twice {unloaded_ms} at {rated[0][0]:g} requests/s already"
    if low != high:
        said += f" (surely to {low:g}, perhaps to {high:g})"
    return Knee(
        unloaded_ttft_p95_s=unloaded.estimate,
        rate_per_s=rate,
        low_rate_per_s=low,
        high_rate_per_s=high,
        is_beyond=rate == top,
        said=said,
    )


def highest(rated: Sequence[tuple[float, float]], limit_s: float) -> float:
    """The last rate from the lowest on whose value is within the limit; 0 where the first is not."""
    found = 0.0
    for rate, value_s in rated:
        if value_s > limit_s:
            break
        found = rate
    return found


def crossover(levels: Sequence[Level], reference: str) -> Crossover | None:
    """Where a mode's tokens/s pass those of the reference; None without ratios."""
    found = [
        (level.concurrency, level.ratios.output_tokens_per_s)
        for level in sorted(levels, key=lambda level: level.concurrency)
        if level.is_closed and level.ratios and level.ratios.output_tokens_per_s
    ]
    if not found:
        return None
    effects = [(streams, ratio, effect(SPEED, ratio)) for streams, ratio in found]
    decided = [one for one in effects if one[2] != "undecided"]
    span = streams_said([streams for streams, _ in found])
    kinds = {word for _, _, word in decided}
    if len(kinds) == 2:
        before, after = next((one, other) for one, other in pairwise(decided) if one[2] != other[2])
        at = crossing(found, before[0], after[0])
        stops = before[2] == "better"
        verb, side = ("stops", "more") if stops else ("starts", "fewer")
        return Crossover(
            kind="stops paying" if stops else "starts paying",
            streams=at,
            low_streams=before[0],
            high_streams=after[0],
            said=f"{verb} paying at about {at:.0f} streams: {side} tokens/s than {reference} up to "
            f"{before[0]}, {'fewer' if stops else 'more'} from {after[0]} on",
        )
    if len(decided) == len(effects):
        pays = decided[0][2] == "better"
        return Crossover(
            kind="always pays" if pays else "never pays",
            streams=None,
            low_streams=0,
            high_streams=0,
            said=f"{'more' if pays else 'fewer'} tokens/s than {reference} at {span}",
        )
    open_ = streams_said([streams for streams, _, word in effects if word == "undecided"])
    said = f"cannot be told from {reference} in tokens/s at {open_}"
    if decided:
        side = "more" if decided[0][2] == "better" else "fewer"
        said = f"{side} tokens/s than {reference} at {streams_said([one[0] for one in decided])}; {said}"
    return Crossover(kind="undecided", streams=None, low_streams=0, high_streams=0, said=said)


def crossing(found: Sequence[tuple[int, Interval]], low: int, high: int) -> float:
    """Streams at which the ratio is 1, on a straight line over the logarithm of streams."""
    inside = [(streams, ratio.estimate) for streams, ratio in found if low <= streams <= high]
    for (left, one), (right, other) in pairwise(inside):
        if (one - 1) * (other - 1) <= 0 and one != other:
            share = (1 - one) / (other - one)
            return exp(log(left) + share * (log(right) - log(left)))
    return float(high)


def streams_said(streams: Sequence[int]) -> str:
    """`1, 4 and 16 streams`."""
    *first, last = [str(count) for count in streams]
    return f"{', '.join(first)}{' and ' if first else ''}{last} stream{'' if last == '1' else 's'}"


def front(rows: Sequence[Row], ratio: Ratio, level_id: str, *, judges_quality: bool) -> dict[str, bool]:
    """Name -> on the Pareto front of speed, bytes and divergence. Off it is what another mode beats for sure:
    faster beyond noise, with no more weight bytes and no more divergence."""

    def beats(one: Row, other: Row) -> bool:
        assert one.memory
        assert other.memory
        if one.memory.weight_bytes > other.memory.weight_bytes:
            return False
        if judges_quality and divergence(one) > divergence(other):
            return False
        found = ratio(one, other, SPEED, level_id)
        return found is not None and found.estimate > 1 and found.excludes(1.0)

    known = [row for row in rows if row.ok and row.memory and (row.quality or not judges_quality)]
    return {row.name: not any(beats(other, row) for other in known if other is not row) for row in known}


def divergence(row: Row) -> float:
    return row.quality.kl_mean if row.quality else 0.0


def null_comparison(row: Row, reference: str) -> NullComparison:
    """What the reference against itself shows: the noise that every other difference has to exceed."""
    found = {
        f"{level.id} {name}": interval
        for level in row.levels
        if level.ratios
        for name in FIGURES
        if (interval := getattr(level.ratios, name)) is not None and interval.low is not None
    }
    beyond = [name for name, interval in found.items() if interval.excludes(1.0)]
    by_chance = (1 - CONFIDENCE) * len(found)
    if not found:
        said = f"{reference} against itself was measured once: nothing is known of this run's noise"
    else:
        said = (
            f"{reference} against itself: {len(beyond)} of {len(found)} ratios lie beyond their intervals, "
            f"chance alone gives {by_chance:.0f}: "
        )
        said += (
            "intervals of this run are too narrow, and a difference that just clears its own is no evidence"
            if len(beyond) > TOO_MANY * by_chance
            else "no sign that intervals are too narrow"
        )
    return NullComparison(row=row, num_figures=len(found), num_beyond=len(beyond), beyond=beyond, said=said)
