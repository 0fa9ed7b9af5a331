"""The columns of the comparison: one definition for the page, the terminal and Markdown.

report --Row--> COLUMNS --Cell--> page, tables
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from service.compare.figures import Interval, effect
from service.compare.forms.notes import goodput_level
from service.compare.forms.words import (
    MILLISECONDS,
    NOTHING,
    PLAIN,
    SIGNS,
    UNTOLD,
    Unit,
    amount,
    change,
    ends,
    estimated,
    exact_change,
    measured,
    size_unit,
)
from service.compare.report import Report, Row

Effect = Literal["better", "worse", "undecided", ""]
Group = Literal["bytes", "speed", "quality", "start"]


@dataclass(frozen=True)
class Cell:
    """`change` and `effect` are against the reference, and empty in its own row.

    `ends` are those of the change, or of the value where nothing is told of a change.
    """

    value: str
    change: str = ""
    ends: str = ""
    effect: Effect = ""

    @property
    def judged(self) -> str:
        """`+31 % ✓`."""
        return self.change + SIGNS.get(self.effect, "")

    @property
    def is_known(self) -> bool:
        return self.value != NOTHING

    @property
    def against(self) -> str:
        """`+31 % ✓ (+28 to +34)`; of a figure without a change its own ends."""
        return f"{self.judged} ({self.ends})".strip() if self.ends else self.judged


@dataclass(frozen=True)
class Column:
    title: str
    unit: str
    group: Group
    cell: Callable[[Row], Cell]

    @property
    def is_latency(self) -> bool:
        return self.unit == MILLISECONDS.name


EMPTY = Cell(NOTHING)
PEAK_NOISE = 0.02  # what allocators keep differs from one start of the same engine to the next
MAIN_LATENCIES = (("ttft", "p95"), ("itl", "p95"))
ALL_LATENCIES = tuple(product(("ttft", "itl", "tpot", "e2e"), ("p50", "p95", "p99")))


def columns(report: Report, latencies: Sequence[tuple[str, str]] = MAIN_LATENCIES) -> list[Column]:
    """What this report has figures for. A column that no row could fill is left out."""
    sizes = unit_of_sizes(report)
    wide, rate = report.workload.throughput_level, report.workload.latency_level
    found = [
        Column("weights", sizes.name, "bytes", lambda row: weights_cell(report, row, sizes)),
        Column("peak", sizes.name, "bytes", lambda row: peak_cell(report, row, sizes)),
        speed_column("tokens/s", "", "output_tokens_per_s", wide, PLAIN),
        speed_column("goodput", "requests/s in SLO", "goodput_per_s", goodput_level(report), PLAIN),
    ]
    for name, percent in latencies:
        title = f"{name.upper()} {percent}"
        found.append(speed_column(title, "ms", f"{name}_{percent}_s", rate, MILLISECONDS))
    found += [
        speed_column("energy", "J per output token", "joules_per_output_token", wide, PLAIN),
        Column("KL", "nats/token", "quality", lambda row: divergence_cell(report, row)),
        Column("perplexity", "", "quality", lambda row: perplexity_cell(report, row)),
        Column("same top‑1", "% of tokens", "quality", lambda row: top1_cell(report, row)),
        Column("same answer", "% of greedy", "quality", lambda row: greedy_cell(report, row)),
        Column("load", "s", "start", load_cell),
    ]
    return [column for column in found if any(column.cell(row).is_known for row in report.rows)]


def unit_of_sizes(report: Report) -> Unit:
    return size_unit(max((row.memory.peak_bytes for row in report.rows if row.memory), default=0))


def speed_column(title: str, unit: str, figure: str, level: str, read_in: Unit) -> Column:
    def cell(row: Row) -> Cell:
        found = row.figure(figure, level)
        if found is None:
            return EMPTY
        ratio = row.ratio(figure, level)
        return Cell(
            estimated(found, read_in), change(ratio), ends(ratio), effect(figure, ratio) if ratio else ""
        )

    return Column(title, unit, "speed", cell)


def weights_cell(report: Report, row: Row, unit: Unit) -> Cell:
    return bytes_cell(report, row, unit, "weight_bytes", 0.0)


def peak_cell(report: Report, row: Row, unit: Unit) -> Cell:
    return bytes_cell(report, row, unit, "peak_bytes", PEAK_NOISE)


def bytes_cell(report: Report, row: Row, unit: Unit, name: str, noise: float) -> Cell:
    """Bytes are counted, not sampled: a difference of more than the share `noise` is one."""
    if row.memory is None:
        return EMPTY
    size: int = getattr(row.memory, name)
    base = report.reference_row
    if base is None or base.memory is None or base.name == row.name:
        return Cell(measured(size, unit))
    other: int = getattr(base.memory, name)
    said = exact_change(size, other)
    if abs(size - other) <= noise * other:
        return Cell(measured(size, unit), said if size == other else f"{UNTOLD} {said}", effect="undecided")
    return Cell(measured(size, unit), said, effect="better" if size < other else "worse")


def divergence_cell(report: Report, row: Row) -> Cell:
    if row.quality is None or not report.judges_quality:
        return EMPTY
    known = row.quality.kl if row.name != report.reference else None
    return Cell(f"{row.quality.kl_mean:.4f}", ends=span(known, 1.0, 4))


def perplexity_cell(report: Report, row: Row) -> Cell:
    if row.quality is None or not report.judges_quality:
        return EMPTY
    ratio = None if row.name == report.reference else row.quality.perplexity_ratio
    known = effect("perplexity", ratio) if ratio else ""
    return Cell(f"{row.quality.perplexity:.3f}", change(ratio), ends(ratio), known)


def top1_cell(report: Report, row: Row) -> Cell:
    if row.quality is None or not report.judges_quality:
        return EMPTY
    known = row.quality.top1 if row.name != report.reference else None
    return Cell(f"{100 * row.quality.top1_agreement:.1f}", ends=span(known, 100.0, 1))


def greedy_cell(report: Report, row: Row) -> Cell:
    """Of whole answers; below, how far the median one agrees."""
    if row.quality is None or row.quality.greedy is None or not report.judges_quality:
        return EMPTY
    found = row.quality.greedy
    agreed = f"median {found.median_agreed_tokens}/{found.num_tokens}"
    return Cell(f"{100 * found.same_share:.0f}", ends=agreed)


def span(interval: Interval | None, times: float, places: int) -> str:
    """`± 0.0016`: of a figure itself, not of a change."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"± {times * (interval.high - interval.low) / 2:.{places}f}"


def load_cell(row: Row) -> Cell:
    return Cell(amount(row.loading.seconds.estimate)) if row.loading else EMPTY
