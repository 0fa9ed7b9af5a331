"""The comparison as CSV in base units: a mode a line, and beside it a line for each mode and level of load.

export --Report--> modes_csv(), levels_csv()
"""

import csv
import io
from collections.abc import Callable, Iterable, Sequence

from service.compare.figures import FIGURES, Figures, Interval
from service.compare.forms.notes import goodput_level
from service.compare.report import Report, Row

Field = Callable[[Row], object]


def written(head: Iterable[str], lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    table.writerows(lines)
    return text.getvalue()


def modes_csv(report: Report) -> str:
    """Bytes, seconds, quality; speed at the two levels that tables show, with intervals."""
    fields: dict[str, Field] = {
        "mode": lambda row: row.name,
        "status": lambda row: row.status,
        "error": lambda row: " ".join(row.error.split()),
        "num_repeats": lambda row: row.num_repeats,
        "kv_dtype": lambda row: row.kv_dtype,
        "weight_bytes": lambda row: row.memory and row.memory.weight_bytes,
        "kv_bytes": lambda row: row.memory and row.memory.kv_bytes,
        "kv_bytes_per_token": lambda row: row.memory and row.memory.kv_bytes_per_token,
        "peak_load_bytes": lambda row: row.memory and row.memory.peak_load_bytes,
        "peak_bytes": lambda row: row.memory and row.memory.peak_bytes,
        "peak_without_kv_bytes": lambda row: row.memory and row.memory.peak_without_kv_bytes,
        "more_kv_tokens": lambda row: row.purchase and row.purchase.more_kv_tokens,
        "more_requests": lambda row: row.purchase and row.purchase.more_requests,
        "quantize_s": lambda row: row.loading and row.loading.quantize_seconds,
        **ends_of("load_s", lambda row: row.loading and row.loading.seconds),
        "perplexity": lambda row: row.quality and row.quality.perplexity,
        **ends_of("perplexity_ratio", lambda row: row.quality and row.quality.perplexity_ratio),
        **ends_of("kl", lambda row: row.quality and row.quality.kl),
        **ends_of("top1_agreement", lambda row: row.quality and row.quality.top1),
        "kl": lambda row: row.quality and row.quality.kl_mean,
        "top1_agreement": lambda row: row.quality and row.quality.top1_agreement,
        "greedy_same_share": greedy_field("same_share"),
        "greedy_median_agreed_tokens": greedy_field("median_agreed_tokens"),
        "disagreement": lambda row: (
            row.quality and row.quality.agreement and row.quality.agreement.disagreement
        ),
        "knee_rate_per_s": lambda row: row.knee and row.knee.rate_per_s,
        "crossover": lambda row: row.crossover and row.crossover.kind,
        "crossover_streams": lambda row: row.crossover and row.crossover.streams,
        "is_on_front": lambda row: row.is_on_front,
    }
    for figure in FIGURES:
        per_window = figure in ("output_tokens_per_s", "requests_per_s") or figure.startswith("joules")
        id = report.workload.throughput_level if per_window else report.workload.latency_level
        id = goodput_level(report) if figure == "goodput_per_s" else id
        fields |= ends_of(figure, figure_at(figure, id))
        fields |= ends_of(f"{figure}_ratio", ratio_at(figure, id))
    return written(fields, ([field(row) for field in fields.values()] for row in report.rows))


def levels_csv(report: Report) -> str:
    """Every figure at every level, with its ratio to the reference: a line for each."""
    head = ["mode", "level", "concurrency", "rate_per_s", "figure", "n", "estimate", "low", "high"]
    lines = []
    for row in report.rows:
        for level in row.levels:
            for figure in FIGURES:
                found = [interval_of(level.figures, figure), interval_of(level.ratios, figure)]
                if found[0] is None:
                    continue
                where = [row.name, level.id, level.concurrency, level.rate_per_s, figure, found[0].n]
                lines.append([*where, *(end for one in found for end in ends(one))])
    return written([*head, "ratio", "ratio_low", "ratio_high"], lines)


def interval_of(figures: Figures | None, name: str) -> Interval | None:
    found: Interval | None = getattr(figures, name) if figures else None
    return found


def greedy_field(name: str) -> Field:
    return lambda row: row.quality and row.quality.greedy and getattr(row.quality.greedy, name)


def figure_at(name: str, id: str) -> Field:
    return lambda row: row.figure(name, id)


def ratio_at(name: str, id: str) -> Field:
    return lambda row: row.ratio(name, id)


def ends(interval: object) -> list[float | None]:
    if not isinstance(interval, Interval):
        return [None, None, None]
    return [interval.estimate, interval.low, interval.high]


def ends_of(name: str, find: Field) -> dict[str, Field]:
    """An interval as three columns: `name`, `name_low`, `name_high`."""
    return {
        name: lambda row: ends(find(row))[0],
        f"{name}_low": lambda row: ends(find(row))[1],
        f"{name}_high": lambda row: ends(find(row))[2],
    }
