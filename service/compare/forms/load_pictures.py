"""The drawings of speed: tokens/s by streams, latencies and goodput by rate, percentiles.

pictures --Report, Mark--> here --figures--> curves, rows
"""

from service.compare.forms.curves import Curve, Event, Level, Point, curves, shares
from service.compare.forms.notes import level_words
from service.compare.forms.rows import Ladder, ladders
from service.compare.forms.svg import Mark, Picture
from service.compare.forms.words import MILLISECONDS, PLAIN, Unit
from service.compare.report import Report, Row, Slo

TITLES = {"ttft": "Time to first token", "itl": "Time between tokens"}


def load_pictures(report: Report, drawn: dict[str, Mark]) -> list[Picture]:
    slo = report.workload.slo or Slo()
    found = [
        throughput(report, drawn),
        latency_by_rate(report, drawn, "ttft", slo.ttft_s),
        latency_by_rate(report, drawn, "itl", slo.itl_s),
        goodput(report, drawn),
        percentiles(report, drawn, "ttft"),
        percentiles(report, drawn, "itl"),
        gaps(report, drawn),
    ]
    return [one for one in found if one]


def by_load(
    report: Report, drawn: dict[str, Mark], figure: str, unit: Unit, *, is_closed: bool
) -> list[Curve]:
    """A figure of every mode over its closed levels by streams, or its open ones by rate."""
    found = []
    for row in report.rows:
        points = [
            Point.of(level.concurrency or level.rate_per_s, interval, unit)
            for level in row.levels
            if level.is_closed is is_closed and (interval := getattr(level.figures, figure)) is not None
        ]
        if points:
            found.append(Curve(drawn[row.name], sorted(points, key=lambda point: point.x)))
    return found


def throughput(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    series = by_load(report, drawn, "output_tokens_per_s", PLAIN, is_closed=True)
    if not series:
        return None
    events = []
    for row in report.rows:
        found = row.crossover
        if found and found.streams is not None:
            low, high = found.low_streams or found.streams, found.high_streams or found.streams
            events.append(
                Event(
                    drawn[row.name],
                    found.streams,
                    low,
                    high,
                    f"{row.name} {found.kind} at about {found.streams:.0f} streams",
                )
            )
    svg = curves(
        series,
        "streams at once (each waits for its answer)",
        "output tokens/s",
        "Tokens per second by streams",
        log_x=True,
        events=events,
    )
    caption = "Higher is better. Bands are intervals."
    if events:
        caption += (
            f" A ring is where a mode and {report.reference} change places; its bar, between which levels."
        )
    return Picture("Tokens/s as streams are added", svg, caption)


def latency_by_rate(
    report: Report, drawn: dict[str, Mark], name: str, limit_s: float | None
) -> Picture | None:
    series = by_load(report, drawn, f"{name}_p95_s", MILLISECONDS, is_closed=False)
    if not series:
        return None
    limits = [Level(1e3 * limit_s, f"SLO: {1e3 * limit_s:g} ms")] if limit_s else []
    events = [
        Event(
            drawn[row.name],
            row.knee.rate_per_s,
            row.knee.low_rate_per_s,
            row.knee.high_rate_per_s,
            knee_words(row),
        )
        for row in report.rows
        if name == "ttft" and row.knee and row.knee.rate_per_s and not row.knee.is_beyond
    ]
    title = TITLES[name]
    svg = curves(
        series,
        "requests/s (Poisson arrivals)",
        "p95, ms (logarithmic)",
        f"{title} by rate",
        log_y=True,
        levels=limits,
        events=events,
    )
    caption = "Lower is better; timed from when a request was due, not from when it was sent."
    if events:
        caption += " The knee is the highest rate at which p95 stays within twice the unloaded one."
    return Picture(f"{title}, p95, as requests come faster", svg, caption)


def knee_words(row: Row) -> str:
    assert row.knee is not None
    return f"knee of {row.name}: {row.knee.rate_per_s:g} requests/s"


def goodput(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    series = by_load(report, drawn, "goodput_per_s", PLAIN, is_closed=False)
    if not series or report.workload.slo is None:
        return None
    svg = curves(series, "requests/s that came", "requests/s that met the SLO", "Goodput by rate")
    return Picture("Goodput", svg, f"Higher is better. SLO: {report.workload.slo.said}.")


def percentiles(report: Report, drawn: dict[str, Mark], name: str) -> Picture | None:
    level = report.workload.latency_level
    found = []
    for row in report.rows:
        values = [row.figure(f"{name}_{percent}_s", level) for percent in ("p50", "p95", "p99")]
        known = [1e3 * value.estimate for value in values if value is not None]
        if len(known) == len(values):
            found.append(Ladder(drawn[row.name], *known))
    # a client that is kept from running reads many tokens at once; gaps of 0 have no logarithm
    if not any(ladder.p99 > 0 for ladder in found):
        return None
    title = TITLES[name]
    svg = ladders(found, "ms (logarithmic)", f"{title}: percentiles")
    return Picture(
        f"{title}: p50, p95, p99", svg, f"{level_words(report, level)}. Bar: p50; filled: p95; hollow: p99."
    )


def gaps(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    """All gaps between tokens, pooled. Tokens that are read together have none, and no logarithm."""
    level, found = report.workload.latency_level, []
    for row in report.rows:
        at = row.level(level)
        curve = at.itl_curve_s if at else []
        shares_of = [100 * n / max(len(curve) - 1, 1) for n in range(len(curve))]
        points = [Point(1e3 * gap_s, y, y, y) for gap_s, y in zip(curve, shares_of, strict=True) if gap_s > 0]
        if points:
            found.append(Curve(drawn[row.name], points))
    if not found:
        return None
    svg = shares(found, "ms between two tokens (logarithmic)", "Share of gaps that are at most so long")
    caption = f"{level_words(report, level)}. Further left is better; a long tail to the right is a stutter."
    return Picture("Time between tokens: all of them", svg, caption)
