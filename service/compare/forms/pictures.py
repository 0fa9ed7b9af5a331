"""Report -> every drawing of its page, by section; one without figures is left out.

page --Report--> pictures() --figures--> curves, rows
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service import ledger
from service.compare.figures import Interval, effect
from service.compare.forms.curves import Curve, Dot, Event, Level, Point, curves, front
from service.compare.forms.notes import level_words
from service.compare.forms.rows import Bar, Difference, Ladder, Stack, bars, intervals, ladders, stacks
from service.compare.forms.svg import Mark
from service.compare.forms.words import (
    MILLISECONDS,
    PLAIN,
    Unit,
    amount,
    estimated,
    percent_of,
    signed,
    size_unit,
)
from service.compare.report import Memory, Report, Row, Slo

KV_CACHE, BEYOND, SMALL = "KV cache", "else, at the peak", "smaller parts"
SMALLEST_PART = 0.012  # of the longest stack


@dataclass(frozen=True)
class Picture:
    title: str
    svg: str
    caption: str


def marks(report: Report) -> dict[str, Mark]:
    """Name of a mode -> how it is drawn everywhere on the page."""
    return {row.name: Mark(row.name, place) for place, row in enumerate(report.rows)}


def pictures(report: Report) -> dict[str, list[Picture]]:
    """Section of the page -> its drawings."""
    drawn, slo = marks(report), report.workload.slo or Slo()
    sections: dict[str, list[Picture | None]] = {
        "differences": [difference(report, drawn, *what) for what in differences(report)],
        "load": [
            throughput(report, drawn),
            latency_by_rate(report, drawn, "ttft", slo.ttft_s),
            latency_by_rate(report, drawn, "itl", slo.itl_s),
            goodput(report, drawn),
            percentiles(report, drawn, "ttft"),
            percentiles(report, drawn, "itl"),
        ],
        "quality": [quality_front(report, drawn), perplexities(report, drawn)],
        "memory": [memory(report, drawn), bought(report, drawn)],
        "costs": [energy(report, drawn), start(report, drawn)],
    }
    return {name: [one for one in found if one] for name, found in sections.items()}


def differences(report: Report) -> list[tuple[str, str, str, str]]:
    """(title, figure, level, which way is better) of what a deployment is chosen by."""
    wide, rate = report.workload.throughput_level, report.workload.latency_level
    return [
        ("Tokens/s", "output_tokens_per_s", wide, "right"),
        ("Time to first token, p95", "ttft_p95_s", rate, "left"),
        ("Time between tokens, p95", "itl_p95_s", rate, "left"),
        ("Requests/s that met the SLO", "goodput_per_s", rate, "right"),
        ("Joules per output token", "joules_per_output_token", wide, "left"),
    ]


def difference(
    report: Report, drawn: dict[str, Mark], title: str, figure: str, level: str, side: str
) -> Picture | None:
    tested = [
        of_ratio(drawn[row.name], figure, ratio)
        for row in report.rows
        if (ratio := row.ratio(figure, level)) is not None
    ]
    if not tested:
        return None
    null = report.null.row.ratio(figure, level) if report.null else None
    noise = (
        None
        if null is None or null.low is None or null.high is None
        else (percent_of(null.low), percent_of(null.high))
    )
    svg = intervals(
        tested, noise, f"% against {report.reference}", f"{title}: change against {report.reference}"
    )
    return Picture(title, svg, f"{level_words(report, level)}. Further {side} is better.")


def of_ratio(mark: Mark, figure: str, ratio: Interval) -> Difference:
    middle = percent_of(ratio.estimate)
    low = middle if ratio.low is None else percent_of(ratio.low)
    high = middle if ratio.high is None else percent_of(ratio.high)
    return Difference(mark, middle, low, high, f"{signed(middle)} %", effect(figure, ratio))


def point(x: float, interval: Interval, unit: Unit) -> Point:
    middle = interval.estimate / unit.divisor
    low = middle if interval.low is None else interval.low / unit.divisor
    high = middle if interval.high is None else interval.high / unit.divisor
    return Point(x, middle, low, high)


def by_load(
    report: Report, drawn: dict[str, Mark], figure: str, unit: Unit, *, is_closed: bool
) -> list[Curve]:
    """A figure of every mode over its closed levels by streams, or its open ones by rate."""
    found = []
    for row in report.rows:
        points = [
            point(level.concurrency or level.rate_per_s, interval, unit)
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
    title = {"ttft": "Time to first token", "itl": "Time between tokens"}[name]
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
    if not found:
        return None
    title = {"ttft": "Time to first token", "itl": "Time between tokens"}[name]
    svg = ladders(found, "ms (logarithmic)", f"{title}: percentiles")
    return Picture(
        f"{title}: p50, p95, p99", svg, f"{level_words(report, level)}. Bar: p50; filled: p95; hollow: p99."
    )


def quality_front(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    """KL against weights and KV cache; only what is trained has a quality."""
    told = [(row, row.memory, row.quality.kl_mean) for row in report.rows if row.memory and row.quality]
    if not report.judges_quality or len(told) < 2:
        return None
    unit = size_unit(max(held_bytes(memory) for _, memory, _ in told))
    spots = [(row, held_bytes(memory) / unit.divisor, max(kl, 0.0)) for row, memory, kl in told]
    dots = [
        Dot(
            drawn[row.name],
            x,
            y,
            y,
            y,
            not any((a <= x and b <= y) and (a, b) != (x, y) for _, a, b in spots),
        )
        for row, x, y in spots
    ]
    svg = front(
        dots,
        f"{unit.name} of weights and KV cache",
        f"KL from {report.reference}, nats per token (logarithmic)",
        "Quality against memory",
    )
    caption = "Down and left is better. The dashed line joins modes that no other beats in both."
    best = [row.name for row in report.rows if row.is_on_front]
    if best:
        caption += f" Counting speed too, nothing surely beats {', '.join(best)}."
    return Picture("What is lost against what it takes", svg, caption)


def held_bytes(memory: Memory) -> int:
    """What a mode takes to hold the same tokens: KV types differ as weights do."""
    return memory.weight_bytes + memory.kv_bytes


def perplexities(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    if not report.judges_quality:
        return None
    tested = [
        of_ratio(drawn[row.name], "perplexity", row.quality.perplexity_ratio)
        for row in report.rows
        if row.quality and row.quality.perplexity_ratio
    ]
    if not tested:
        return None
    svg = intervals(tested, None, f"% against {report.reference}", "Perplexity: change against the reference")
    return Picture("Perplexity", svg, "Paired token by token over the same text. Further left is better.")


def memory(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    rows = [(row, row.memory) for row in report.rows if row.memory]
    if not rows:
        return None
    unit = size_unit(max(memory.peak_bytes for _, memory in rows))
    stacked = large_parts([parts_of(memory) for _, memory in rows])
    found = [
        Stack(
            drawn[row.name],
            [(part, size / unit.divisor) for part, size in parts.items()],
            f"{amount(sum(parts.values()) / unit.divisor)} {unit.name}",
        )
        for (row, _), parts in zip(rows, stacked, strict=True)
    ]
    svg = stacks(found, unit.name, "Memory by part")
    return Picture(
        "Memory at the peak, by part", svg, "The engine under load, by its own ledger. Shorter is better."
    )


def parts_of(memory: Memory) -> dict[str, int]:
    """Parts in the ledger's order, the KV cache as one, then what the peak holds beyond them all."""
    order = {part.name: place for place, part in enumerate(ledger.PARTS)}
    parts: dict[str, int] = {}
    for name, size in sorted(memory.parts.items(), key=lambda item: order.get(item[0], len(order))):
        # how much of the cache was in use at the moment of reading says nothing of a mode
        words = KV_CACHE if name.startswith("kv.") else name.replace(".", ": ").replace("_", " ")
        parts[words] = parts.get(words, 0) + size
    parts[BEYOND] = memory.peak_bytes - sum(parts.values())
    return {name: size for name, size in parts.items() if size > 0}


def large_parts(rows: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """Parts that nobody could see in any stack become one: there are more of them than letters are read."""
    least = SMALLEST_PART * max(sum(parts.values()) for parts in rows)
    large = {name for parts in rows for name, size in parts.items() if size >= least}
    found = []
    for parts in rows:
        shown = {name: size for name, size in parts.items() if name in large}
        small = sum(parts.values()) - sum(shown.values())
        found.append(shown | ({SMALL: small} if small else {}))
    return found


def bought(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    """What a mode's saving holds in KV cache, where it saves."""
    found = [
        Bar(drawn[row.name], gain, gain, gain, f"{gain:,d} tokens = {row.purchase.more_requests:,d} requests")
        for row in report.rows
        if row.purchase and (gain := row.purchase.more_kv_tokens) > 0
    ]
    if not found:
        return None
    svg = bars(found, "tokens of KV cache", "What the saving buys")
    request = next(row.purchase.request_tokens for row in report.rows if row.purchase)
    caption = (
        f"At equal memory: weights saved against {report.reference}, spent on KV cache. A request of this "
        f"traffic takes {request:,.0f} tokens. More is better."
    )
    return Picture("What the saving buys", svg, caption)


def barred(
    report: Report, drawn: dict[str, Mark], find: Callable[[Row], Interval | None], unit: str
) -> list[Bar]:
    found = []
    for row in report.rows:
        interval = find(row)
        if interval is not None:
            at = point(0, interval, PLAIN)
            found.append(Bar(drawn[row.name], at.y, at.low, at.high, f"{estimated(interval)} {unit}"))
    return found


def energy(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    level = report.workload.throughput_level
    found = barred(report, drawn, lambda row: row.figure("joules_per_output_token", level), "J")
    if not found:
        return None
    idle = [
        run.energy.idle_watts for row in report.rows for each in row.levels for run in each.runs if run.energy
    ]
    svg = bars(found, "joules per output token", "Energy per token")
    drawing = f"; idle it draws {min(idle):.0f} to {max(idle):.0f} W" if idle else ""
    caption = f"{level_words(report, level)}, the whole device{drawing}. Shorter is better."
    return Picture("Energy per token", svg, caption)


def start(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    found = barred(report, drawn, lambda row: row.loading.seconds if row.loading else None, "s")
    if not found:
        return None
    svg = bars(found, "seconds from start to ready", "Load time")
    return Picture(
        "Time to start", svg, "From spawning the engine to ready, its checkpoint prepared. Shorter is better."
    )
