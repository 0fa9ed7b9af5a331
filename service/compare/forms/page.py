"""Report -> one HTML file that needs nothing beside it: styles, drawings and every run's figures are inside.

export.write_report --Report--> render_page() --HTML--> report.html
"""

import re
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from service import ledger
from service.compare.figures import Latency
from service.compare.forms import rows, svg
from service.compare.forms.columns import (
    ALL_LATENCIES,
    Cell,
    Column,
    columns,
    unit_of_sizes,
)
from service.compare.forms.notes import goodput_level, level_words, reason, warnings
from service.compare.forms.pictures import marks, parts_of, pictures
from service.compare.forms.tables import answer
from service.compare.forms.words import MILLISECONDS, amount
from service.compare.forms.words import measured as written
from service.compare.report import Report, Row


@dataclass(frozen=True)
class Tile:
    """One figure of the mode to deploy, beside the reference's."""

    title: str
    unit: str
    base: str
    cell: Cell


@dataclass(frozen=True)
class Span:
    """Cells of neighbouring columns, or one text over all of them."""

    cells: list[tuple[Column, Cell]]
    reason: str = ""


@cache
def template() -> Template:
    environment = Environment(
        loader=PackageLoader("service.compare.forms", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percentiles"] = percentiles
    environment.filters["amount"] = amount
    environment.filters["ticked"] = ticked
    environment.filters["signed_count"] = lambda count: f"{count:+,d}".replace("-", "−")
    return environment.get_template("page.html")


def render_page(report: Report) -> str:
    """The whole page, as text."""
    shown = columns(report)
    measured = [row for row in [*report.rows, *([report.null.row] if report.null else [])] if row.levels]
    held = [(row, parts_of(row.memory)) for row in report.rows if row.memory]
    return template().render(
        report=report,
        marks={name: Markup(legend(mark)) for name, mark in marks(report).items()},
        columns=shown,
        spans={row.name: spans(row, shown) for row in report.rows},
        null_cells=null_cells(report, shown),
        tiles=tiles(report),
        pictures={
            section: [(one.title, Markup(one.svg), one.caption) for one in found]
            for section, found in pictures(report).items()
        },
        sizes=unit_of_sizes(report),
        goodput_level=goodput_level(report),
        level_words=lambda id: level_words(report, id),
        level_ids=list(dict.fromkeys(level.id for row in measured for level in row.levels)),
        latencies=[column for column in columns(report, ALL_LATENCIES) if column.is_latency],
        answer=answer(report),
        warnings=warnings(report),
        measured_rows=measured,
        agreements=[
            (row, row.quality.agreement) for row in report.rows if row.quality and row.quality.agreement
        ],
        agreement_said=agreement_said(report),
        held=held,
        ledger=ledger.PARTS,
        part_names=list(dict.fromkeys(part for _, parts in held for part in parts)),
        num_colours=svg.NUM_COLOURS,
        shades=rows.SHADES,
    )


def legend(mark: svg.Mark) -> str:
    """The mode's mark for a line of text."""
    return svg.tag("svg", mark.drawn(6, 6), viewBox="0 0 12 12", aria_hidden="true")


def spans(row: Row, shown: list[Column]) -> list[Span]:
    """A row's cells; what a mode without speed lacks is one text over the columns that lack it."""
    if row.ok:
        return [Span([(column, column.cell(row)) for column in shown])]
    if row.status == "failed":
        return [Span([(column, column.cell(row)) for column in shown], reason(row))]
    lacking = [column for column in shown if column.group in ("bytes", "speed")]
    known = [column for column in shown if column.group not in ("bytes", "speed")]
    return [
        Span([(column, column.cell(row)) for column in lacking], reason(row)),
        Span([(column, column.cell(row)) for column in known]),
    ]


def null_cells(report: Report, shown: list[Column]) -> list[Cell]:
    """The reference against itself: of its speed alone there is noise to tell."""
    if report.null is None:
        return []
    row = report.null.row
    return [column.cell(row) if column.group == "speed" else Cell("") for column in shown]


def tiles(report: Report) -> list[Tile]:
    """What deploying the chosen mode changes, figure by figure; none where nothing is to deploy."""
    chosen = report.verdict.deploy if report.verdict else ""
    row = next((row for row in report.rows if row.name == chosen), None)
    base = report.reference_row
    if row is None:
        return []
    found = []
    for column in columns(report):
        cell = column.cell(row)
        if column.group == "start" or not cell.is_known:
            continue
        other = column.cell(base) if base and base is not row else None
        beside = other.value if other and other.is_known else ""
        found.append(Tile(column.title, column.unit, beside, cell))
    return found


def agreement_said(report: Report) -> str:
    """In a few words, for who does not unfold the table."""
    flagged = [
        row.name
        for row in report.rows
        if row.quality and row.quality.agreement and not row.quality.agreement.agrees
    ]
    return f"Not for {', '.join(flagged)}: decode and prefill are apart." if flagged else "Yes."


def ticked(said: str) -> Markup:
    """A sentence, with what stands in backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(said))))


def percentiles(latency: Latency | None) -> str:
    """`12.1 / 20.3 / 31.0`, ms."""
    if latency is None:
        return written(None)
    return " / ".join(written(value, MILLISECONDS) for value in (latency.p50, latency.p95, latency.p99))
