"""A Report in every form: terminal table, JSON, Markdown, CSV, and the page.

job --Report--> write_report(), print_report()
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from service.compare.files import write_whole
from service.compare.page import render_page
from service.compare.plan import REPORT_FILE
from service.compare.report import (
    MAX_DISAGREEMENT,
    MIN_STANDARD_ERRORS,
    Agreement,
    Apart,
    Report,
    Row,
)

NOTHING = "-"
NO_VERDICT = "no verdict"  # on quality, where the weights are random
Cell = Callable[[Report, Row], str]


def write_report(report: Report, out: Path) -> None:
    """report.json, report.html, report.md and report.csv in `out`."""
    write_whole(out / REPORT_FILE, msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    write_whole(out / "report.html", render_page(report).encode())
    write_whole(out / "report.md", markdown(report).encode())
    write_whole(out / "report.csv", comma_separated(report).encode())


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def latency_cell(name: str) -> Cell:
    """`p50 / p95` in milliseconds, at the level that tables show."""

    def cell(report: Report, row: Row) -> str:
        found = [row.figure(f"{name}_{p}_s", report.workload.latency_level) for p in ("p50", "p95")]
        return " / ".join(f"{1e3 * one.estimate:.1f}" for one in found if one) or NOTHING

    return cell


def speed_cell(report: Report, row: Row) -> str:
    found = row.figure("output_tokens_per_s", report.workload.throughput_level)
    return f"{found.estimate:.1f}" if found else NOTHING


def change(value: float, base: float) -> str:
    """`+3.1 %` against the reference."""
    return f"{100 * (value / base - 1):+.1f} %"


def memory_cell(report: Report, row: Row) -> str:
    assert row.memory is not None
    return megabytes(row.memory.weight_bytes)


def peak_cell(report: Report, row: Row) -> str:
    assert row.memory is not None
    return f"{megabytes(row.memory.peak_bytes)} / {megabytes(row.memory.peak_without_kv_bytes)}"


def perplexity_cell(report: Report, row: Row) -> str:
    assert row.quality is not None
    if not report.judges_quality:
        return NO_VERDICT
    base, perplexity = report.reference_row, row.quality.perplexity
    if base is None or base.quality is None or base is row:
        return f"{perplexity:.3f}"
    return f"{perplexity:.3f} ({change(perplexity, base.quality.perplexity)})"


def divergence_cell(report: Report, row: Row) -> str:
    assert row.quality is not None
    return f"{row.quality.kl_mean:.4f}" if report.judges_quality else NO_VERDICT


def top1_cell(report: Report, row: Row) -> str:
    assert row.quality is not None
    if not report.judges_quality:
        return NO_VERDICT
    return f"{100 * row.quality.top1_agreement:.1f} %"


def purchase_cell(report: Report, row: Row) -> str:
    return f"{row.purchase.more_kv_tokens:+,d}" if row.purchase else NOTHING


def decode_cell(mode: str) -> Cell:
    def cell(report: Report, row: Row) -> str:
        assert row.quality is not None
        apart = row.quality.agreement.apart[mode]
        return f"{difference(apart)}{' (!)' if apart.is_flagged else ''}"

    return cell


def difference(apart: Apart) -> str:
    """`-0.33 ± 0.50 %`: with its standard error."""
    return f"{100 * apart.change:+.2f} ± {100 * apart.standard_error:.2f} %"


COLUMNS: dict[str, Cell] = {
    "weights MB": memory_cell,
    "peak MB, with / without KV": peak_cell,
    "load s": lambda report, row: f"{row.loading.seconds.estimate:.1f}" if row.loading else NOTHING,
    "TTFT ms p50 / p95": latency_cell("ttft"),
    "ITL ms p50 / p95": latency_cell("itl"),
    "TPOT ms p50 / p95": latency_cell("tpot"),
    "tokens/s": speed_cell,
    "perplexity": perplexity_cell,
    "KL": divergence_cell,
    "top-1": top1_cell,
    "decode M=1 vs prefill": decode_cell("M=1"),
    "decode M=8 vs prefill": decode_cell("M=8"),
    "KV tokens gained": purchase_cell,
}


def cells(report: Report, row: Row) -> list[str]:
    """One row as text; a failed one has its reason in place of figures."""
    if not row.ok:
        return [row.name, f"failed: {row.error.splitlines()[0]}"]
    return [row.name, *(cell(report, row) for cell in COLUMNS.values())]


def notes(report: Report) -> list[str]:
    """What a reader must know to use the table."""
    widest = max((level.concurrency for row in report.rows for level in row.levels), default=0)
    said = [
        f"TTFT, ITL, TPOT: open loop, Poisson arrivals "
        f"({report.workload.rate_rule}), timed from when each request was due.",
        f"tokens/s: closed loop with {widest} streams. Perplexity and KL (nats per token, against "
        f"{report.reference}): {report.text.name}, {report.text.protocol}.",
        "KV tokens gained: what the weight bytes saved against the reference would hold in the KV cache.",
        *([report.kv_note] if report.kv_note else []),
        "Decode vs prefill: perplexity of the same tokens, ± standard error of the paired difference over "
        f"windows; (!) is more than {100 * MAX_DISAGREEMENT:g} % and more than {MIN_STANDARD_ERRORS:g} "
        "standard errors.",
    ]
    if report.not_measured:
        said.append(f"(!) Stopped: {', '.join(report.not_measured)} not measured. The same command goes on.")
    for row in report.rows:
        if row.loading and row.loading.quantize_seconds:
            said.append(
                f"{row.name}: its checkpoint was made in {row.loading.quantize_seconds:.1f} s by an engine "
                "of its own, and is kept; the measured engine only loaded it."
            )
        if row.quality:
            said += decode_notes(row.name, row.quality.agreement)
        for level in row.levels:
            if level.num_errors or level.num_short:
                said.append(
                    f"(!) {row.name}, {level.id}: {level.num_errors} requests failed, "
                    f"{level.num_short} answers were short."
                )
    return said


def decode_notes(precision: str, agreement: Agreement) -> list[str]:
    """What is to be said of differences that are larger than allowed: flagged, or undecided."""
    said = []
    for mode, apart in agreement.apart.items():
        found = (
            f"{precision}, decode {mode}: {difference(apart)} from prefill on {agreement.tokens:,d} tokens"
        )
        if apart.is_flagged:
            said.append(
                f"(!) {found}, more than {100 * MAX_DISAGREEMENT:g} % and more than "
                f"{MIN_STANDARD_ERRORS:g} standard errors."
            )
        elif apart.exceeds:
            said.append(
                f"{found}, more than {100 * MAX_DISAGREEMENT:g} % but within "
                f"{MIN_STANDARD_ERRORS:g} standard errors: too few tokens to decide."
            )
    return said


def print_report(report: Report, out: Path, console: Console) -> None:
    """The table, modes as columns: it fits a terminal of 80 characters with four of them."""
    console.print(f"\n[bold]{escape(report.first_line)}[/bold]\n{escape(report.supports)}\n", highlight=False)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    good = [row for row in report.rows if row.ok]
    for row in good:
        table.add_column(escape(row.name), justify="right")
    for name, cell in COLUMNS.items():
        table.add_row(name, *(cell(report, row) for row in good))
    if good:
        console.print(table)
    for row in report.rows:
        if not row.ok:
            console.print(f"{escape(row.name)}: failed: {escape(row.error)}", highlight=False)
    for note in notes(report) if good else ():
        console.print(escape(note), style="dim", highlight=False)
    console.print(f"\nreport: {out / 'report.html'}", highlight=False, soft_wrap=True)


def markdown(report: Report) -> str:
    """The same table with modes as rows, for an issue or a README."""
    names = ["precision", *COLUMNS]
    lines = [
        f"# {report.first_line}",
        "",
        report.supports,
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
    ]
    for row in report.rows:
        written = [cell.replace("|", "\\|") for cell in cells(report, row)]
        lines.append(f"| {' | '.join(written + [''] * (len(names) - len(written)))} |")
    lines += ["", *(f"- {note}" for note in notes(report)), ""]
    lines.append(", ".join(f"{name} {value}" for name, value in report.environment.items() if value))
    return "\n".join(lines) + "\n"


def comma_separated(report: Report) -> str:
    """Plain numbers in base units, a mode a line."""
    fields: dict[str, Callable[[Row], object]] = {
        "precision": lambda row: row.name,
        "status": lambda row: row.status,
        "error": lambda row: row.error,
        "weight_bytes": lambda row: row.memory and row.memory.weight_bytes,
        "kv_bytes": lambda row: row.memory and row.memory.kv_bytes,
        "kv_dtype": lambda row: row.kv_dtype,
        "peak_load_bytes": lambda row: row.memory and row.memory.peak_load_bytes,
        "peak_bytes": lambda row: row.memory and row.memory.peak_bytes,
        "peak_without_kv_bytes": lambda row: row.memory and row.memory.peak_without_kv_bytes,
        "load_s": lambda row: row.loading and row.loading.seconds.estimate,
        "quantize_s": lambda row: row.loading and row.loading.quantize_seconds,
        "tokens_per_s": figure_field("output_tokens_per_s", report.workload.throughput_level),
        "perplexity": lambda row: row.quality and row.quality.perplexity,
        "kl": lambda row: row.quality and row.quality.kl_mean,
        "top1_agreement": lambda row: row.quality and row.quality.top1_agreement,
        "disagreement": lambda row: row.quality and row.quality.agreement.disagreement,
        "more_kv_tokens": lambda row: row.purchase and row.purchase.more_kv_tokens,
    }
    for mode in ("decode1", "decode8"):
        for name in ("change", "standard_error"):
            fields[f"{mode}_{name}"] = apart_field(f"{mode}_apart", name)
    for name in ("ttft", "itl", "tpot"):
        for percent in ("p50", "p95", "p99"):
            fields[f"{name}_{percent}_s"] = figure_field(f"{name}_{percent}_s", report.workload.latency_level)
    written = io.StringIO()
    table = csv.writer(written)
    table.writerow(fields)
    for row in report.rows:
        table.writerow([field(row) for field in fields.values()])
    return written.getvalue()


def apart_field(mode: str, name: str) -> Callable[[Row], object]:
    return lambda row: row.quality and getattr(getattr(row.quality.agreement, mode), name)


def figure_field(name: str, level_id: str) -> Callable[[Row], object]:
    def field(row: Row) -> object:
        found = row.figure(name, level_id)
        return found.estimate if found else None

    return field
