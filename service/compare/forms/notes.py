"""What a reader has to know beside the figures: what went wrong, and what a column means.

report --Report--> warnings(), explanations() --sentences--> page, tables
"""

from service.compare.forms.words import amount
from service.compare.report import MAX_DISAGREEMENT, Agreement, Apart, Report, Row


def reason(row: Row) -> str:
    """Why a row has no speed: of `does not fit`, what it needs and what there is."""
    return row.error if row.status == "does not fit" else f"failed: {row.error}"


def warnings(report: Report) -> list[str]:
    """What makes figures doubtful, or leaves them out."""
    said = []
    if report.not_measured:
        was = "was" if len(report.not_measured) == 1 else "were"
        said.append(
            f"Stopped before {', '.join(report.not_measured)} {was} measured in full. "
            "The same command goes on from here."
        )
    for row in report.rows:
        if not row.ok:
            said.append(f"{row.name}: {reason(row)}")
        for level in row.levels:
            if level.num_errors or level.num_short:
                said.append(
                    f"{row.name}, {level.label}: {level.num_errors} requests failed, "
                    f"{level.num_short} answers were short."
                )
        if row.quality and row.quality.agreement:
            said += [
                f"{words}, more than {100 * MAX_DISAGREEMENT:g} % and beyond its interval at "
                f"{100 * report.confidence:g} %."
                for apart, words in decode_differences(row.name, row.quality.agreement)
                if apart.is_flagged
            ]
    return said


def explanations(report: Report) -> list[str]:
    """How the table is to be read; ends with what is worth knowing of single modes."""
    work = report.workload
    has_energy = any(row.figure("joules_per_output_token", work.throughput_level) for row in report.rows)
    at_most = level_words(report, goodput_level(report))
    said = [
        f"Changes are against {report.reference}, with their interval at {100 * report.confidence:g} %; "
        "✓ better and ✗ worse are established, ~ cannot be told from none.",
        f"tokens/s{' and energy' if has_energy else ''}: {level_words(report, work.throughput_level)}. "
        f"Latencies: {level_words(report, work.latency_level)}, Poisson arrivals, timed from when each "
        f"request was due ({work.rate_rule}).",
        *(
            [
                f"Perplexity and KL (nats per token, against {report.reference}): {report.text.name}, "
                f"{report.text.protocol}."
            ]
            if report.judges_quality
            else []
        ),
        *(
            [
                "Same answer: greedy answers equal to the reference's as far as was looked; below, the "
                "median number of tokens before the first that differs. In the reference's own row: where "
                "its decode parts from its prefill, by rounding alone."
            ]
            if report.judges_quality and any(row.quality and row.quality.greedy for row in report.rows)
            else []
        ),
        *([f"Goodput: with {work.slo.said}, at {at_most}."] if work.slo else []),
        *([report.kv_note] if report.kv_note else []),
    ]
    for row in report.rows:
        if row.loading and row.loading.quantize_seconds:
            said.append(
                f"{row.name}: its checkpoint was made in {amount(row.loading.quantize_seconds)} s by an "
                "engine of its own, and is kept; the measured engines only loaded it."
            )
        if row.quality and row.quality.agreement:
            said += [
                f"{words}, more than {100 * MAX_DISAGREEMENT:g} % but within its interval at "
                f"{100 * report.confidence:g} %: too few tokens to decide."
                for apart, words in decode_differences(row.name, row.quality.agreement)
                if apart.exceeds and not apart.is_flagged
            ]
    return said


def goodput_level(report: Report) -> str:
    """Id of the highest rate: where a verdict with an SLO looks first, because there modes part."""
    rated = [level for row in report.rows for level in row.levels if not level.is_closed]
    return max(rated, key=lambda level: level.rate_per_s).id if rated else report.workload.latency_level


def level_words(report: Report, id: str) -> str:
    """`64 streams`, `8 requests/s`."""
    found = (row.level(id) for row in report.rows)
    return next((level.label for level in found if level), id)


def decode_differences(name: str, agreement: Agreement) -> list[tuple[Apart, str]]:
    return [
        (apart, f"{name}, decode {mode}: {difference(apart)} from prefill on {agreement.tokens:,d} tokens")
        for mode, apart in agreement.apart.items()
    ]


def difference(apart: Apart) -> str:
    """`−0.33 ± 0.50 %`: with its standard error."""
    return f"{100 * apart.change:+.2f} ± {100 * apart.standard_error:.2f} %".replace("-", "−")
