"""Report -> every drawing of its page, by section; one without figures is left out.

page --Report--> pictures() --figures--> curves, rows
"""

from collections.abc import Callable, Sequence

from service import ledger
from service.compare.figures import Interval, effect
from service.compare.forms.curves import Dot, Point, front
from service.compare.forms.load_pictures import load_pictures
from service.compare.forms.notes import goodput_level, level_words
from service.compare.forms.rows import SHADES, Bar, Difference, Stack, bars, intervals, stacks
from service.compare.forms.svg import Mark, Picture
from service.compare.forms.words import (
    PLAIN,
    SIGNS,
    amount,
    estimated,
    percent_of,
    signed,
    size_unit,
)
from service.compare.report import Memory, Quality, Report, Row

KV_CACHE, BEYOND, SMALL = "KV cache", "else, at the peak", "smaller parts"
SMALLEST_PART = 0.012  # of the longest stack


def marks(report: Report) -> dict[str, Mark]:
    """Name of a mode -> how it is drawn everywhere on the page."""
    return {row.name: Mark(row.name, place) for place, row in enumerate(report.rows)}


def pictures(report: Report) -> dict[str, list[Picture]]:
    """Section of the page -> its drawings."""
    drawn = marks(report)
    sections: dict[str, list[Picture | None]] = {
        "differences": [difference(report, drawn, *what) for what in differences(report)],
        "load": [*load_pictures(report, drawn)],
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
        ("Requests/s that met the SLO", "goodput_per_s", goodput_level(report), "right"),
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
    found = effect(figure, ratio)
    return Difference(mark, middle, low, high, f"{signed(middle)} %{SIGNS.get(found, '')}", found)


def quality_front(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    """KL against weights and KV cache; only what is trained has a quality."""
    told = [(row, row.memory, row.quality) for row in report.rows if row.memory and row.quality]
    if not report.judges_quality or len(told) < 2:
        return None
    unit = size_unit(max(held_bytes(memory) for _, memory, _ in told))
    spots = [(row, held_bytes(memory) / unit.divisor, lost(quality)) for row, memory, quality in told]
    dots = [
        Dot(
            drawn[row.name],
            x,
            *ends,
            is_front=not any((a <= x and b <= ends[0]) and (a, b) != (x, ends[0]) for _, a, (b, *_) in spots),
        )
        for row, x, ends in spots
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


def lost(quality: Quality) -> tuple[float, float, float]:
    """KL and its interval; rounding leaves the reference a little off 0, on either side."""
    kl = max(quality.kl_mean, 0.0)
    if quality.kl is None or quality.kl.low is None or quality.kl.high is None:
        return kl, kl, kl
    return kl, quality.kl.low, quality.kl.high


def held_bytes(memory: Memory) -> int:
    """What a mode takes to hold the same tokens: KV types differ as weights do."""
    return memory.weight_bytes + memory.kv_bytes


def perplexities(report: Report, drawn: dict[str, Mark]) -> Picture | None:
    if not report.judges_quality:
        return None
    tested = [
        of_ratio(drawn[row.name], "perplexity", row.quality.perplexity_ratio)
        for row in report.rows
        if row.quality and row.quality.perplexity_ratio and row.name != report.reference
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
    names = dict.fromkeys(part for _, memory in rows for part in parts_of(memory))
    svg = stacks(found, [*sorted(names, key=place_of), SMALL], unit.name, "Memory by part")
    return Picture(
        "Memory at the peak, by part", svg, "The engine under load, by its own ledger. Shorter is better."
    )


def parts_of(memory: Memory) -> dict[str, int]:
    """Parts in the ledger's order, the KV cache as one, then what the peak holds beyond them all."""
    parts: dict[str, int] = {}
    for name, size in memory.parts.items():
        parts[words_for(name)] = parts.get(words_for(name), 0) + size
    parts[BEYOND] = memory.peak_bytes - sum(parts.values())
    return {name: parts[name] for name in sorted(parts, key=place_of) if parts[name] > 0}


def words_for(part: str) -> str:
    """How much of the cache was in use at the moment of reading says nothing of a mode: its parts are one."""
    return KV_CACHE if part.startswith("kv.") else part.replace(".", ": ").replace("_", " ")


def place_of(words: str) -> int:
    order = [words_for(part.name) for part in ledger.PARTS]
    return order.index(words) if words in order else len(order)


def large_parts(rows: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """Parts that nobody could see in any stack become one: there are more of them than letters are read."""
    least = SMALLEST_PART * max(sum(parts.values()) for parts in rows)
    largest: dict[str, int] = {}
    for parts in rows:
        for name, size in parts.items():
            largest[name] = max(size, largest.get(name, 0))
    named = sorted(largest, key=lambda name: -largest[name])[: len(SHADES) - 1]
    large = {name for name in named if largest[name] >= least}
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
        f"In the memory of {report.reference}'s weights and KV cache: tokens of KV cache beyond its own. A "
        f"request of this traffic takes {request:,.0f} tokens. More is better."
    )
    return Picture("What the saving buys", svg, caption)


def barred(
    report: Report, drawn: dict[str, Mark], find: Callable[[Row], Interval | None], unit: str
) -> list[Bar]:
    found = []
    for row in report.rows:
        interval = find(row)
        if interval is not None:
            at = Point.of(0, interval, PLAIN)
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
