"""The comparison as a table in text: for a terminal with modes side by side, for Markdown with a mode a line.

export --Report--> print_report(), markdown()
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.compare.forms.columns import ALL_LATENCIES, Cell, Column, columns
from service.compare.forms.notes import explanations, warnings
from service.compare.report import Report, Row, Verdict

STYLES = {"better": "green", "worse": "red", "undecided": "dim", "": ""}
MODES_A_TABLE = 5  # side by side; more go below


def answer(report: Report) -> str:
    """The verdict in a few words."""
    verdict = report.verdict
    if verdict is None:
        return "No verdict: the run is not complete" if not report.complete else "No verdict"
    if verdict.deploy:
        return f"Deploy {verdict.deploy}"
    return f"No verdict: {', '.join(verdict.tied)} cannot be told apart" if verdict.tied else "No verdict"


def print_report(report: Report, out: Path, console: Console) -> None:
    """Figures as lines, modes as columns; what to know; and last the verdict: it is what stays in view."""
    console.print(f"\n[bold]{escape(report.first_line)}[/bold]\n{escape(report.supports)}\n", highlight=False)
    shown = columns(report, ALL_LATENCIES)
    measured = [row for row in report.rows if row.levels or row.quality]
    for first in range(0, len(measured), MODES_A_TABLE):
        console.print(side_by_side(measured[first : first + MODES_A_TABLE], shown))
        console.print()
    for said in explanations(report) if measured else ():
        console.print(escape(said), style="dim", highlight=False)
    for said in warnings(report):
        console.print(f"(!) {escape(said)}", highlight=False)
    if report.null:
        console.print(escape(report.null.said), highlight=False)
    console.print(f"\n[bold]{escape(answer(report))}[/bold]", highlight=False)
    for said in spoken(report.verdict):
        console.print(escape(said), highlight=False)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def side_by_side(rows: Sequence[Row], shown: Sequence[Column]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    for row in rows:
        table.add_column(escape(row.name), justify="right")
    for column in shown:
        cells = [column.cell(row) for row in rows]
        if any(cell.is_known for cell in cells):
            table.add_row(titled(column), *(in_colour(cell, column) for cell in cells))
    return table


def in_colour(cell: Cell, column: Column) -> str:
    """Of a latency's three percentiles the p95 has its change: twelve of them would fill two screens."""
    if column.title.endswith(("p50", "p99")) or not (cell.change or cell.ends):
        return cell.value
    if not cell.change:
        return f"{cell.value}\n[dim]{cell.ends}[/dim]"
    style = STYLES[cell.effect]
    said = f"[{style}]{cell.judged}[/{style}]" if style else cell.judged
    return f"{cell.value}\n{said}" + (f"\n[dim]{cell.ends}[/dim]" if cell.ends else "")


def titled(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def spoken(verdict: Verdict | None) -> list[str]:
    """All of a verdict but its answer, in sentences."""
    if verdict is None:
        return []
    return [verdict.headline, *verdict.because, *verdict.costs, *verdict.sureness]


def markdown(report: Report) -> str:
    """For an issue or a README: the verdict, the table, every latency, what to know."""
    shown = columns(report)
    latencies = [column for column in columns(report, ALL_LATENCIES) if column.is_latency]
    verdict = report.verdict
    blocks = [[f"# {answer(report)}"], [plain(report.first_line)], [plain(report.supports)]]
    if verdict:
        blocks.append([plain(verdict.headline)])
        why = "Why" if verdict.deploy else "Known"
        for title, said in ((why, verdict.because), ("Costs", verdict.costs), ("Sure", verdict.sureness)):
            blocks.append([f"{title}:", "", *(f"- {plain(one)}" for one in said)] if said else [])
        rejected = [f"- {plain(name)}: {plain(why)}" for name, why in verdict.rejected.items()]
        blocks.append(["Not the others:", "", *rejected] if rejected else [])
    blocks.append(piped(report, shown))
    blocks.append(piped(report, latencies) if latencies else [])
    told = [*(f"(!) {said}" for said in warnings(report)), *explanations(report)]
    blocks.append(
        [f"- {plain(said)}" for said in told] + ([f"- {plain(report.null.said)}"] if report.null else [])
    )
    blocks.append(
        [plain(", ".join(f"{name} {value}" for name, value in report.environment.items() if value))]
    )
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def piped(report: Report, shown: Sequence[Column]) -> list[str]:
    """A table of Markdown; a mode without figures has its reason among the warnings."""
    head = ["mode", *(titled(column) for column in shown)]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * len(shown)}"]
    for row in report.rows:
        cells = [column.cell(row) for column in shown]
        told = [cell.value if cell.is_known else "" for cell in cells] if row.ok else []
        against = [f"{value} {cell.against}".strip() for value, cell in zip(told, cells, strict=False)]
        lines.append(f"| {' | '.join([plain(row.name), *(against or without(row, cells))])} |")
    return lines


def without(row: Row, cells: Sequence[Cell]) -> list[str]:
    return [cell.value if cell.is_known else row.status for cell in cells]


def plain(text: str) -> str:
    """On one line, with nothing in it that Markdown or HTML would take for its own."""
    joined = " ".join(text.split())
    for special in "\\`*|<[":
        joined = joined.replace(special, f"\\{special}")
    return joined
