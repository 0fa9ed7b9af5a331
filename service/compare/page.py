"""Report -> one HTML file that needs nothing beside it: styles, plots and figures are inside.

export.write_report --Report--> render_page() --HTML--> report.html
"""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from service.compare.loads import CURVE_PERCENTS
from service.compare.plots import Series, bars, distribution, scatter, stacks
from service.compare.report import Report, Row


@cache
def template() -> Template:
    environment = Environment(
        loader=PackageLoader("service.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["mb"] = lambda size: f"{size / 1e6:,.1f}"
    environment.filters["ms"] = lambda seconds: f"{1e3 * seconds:,.1f}"
    return environment.get_template("page.html")


def render_page(report: Report) -> str:
    """The whole page, as text."""
    places = {row.name: place for place, row in enumerate(report.rows)}
    good = [row for row in report.rows if row.ok]
    return template().render(
        report=report,
        base=report.reference_row,
        good=good,
        places=places,
        plots={
            name: Markup(svg)
            for name, svg in plots(good, places).items()
            if name != "quality" or report.judges_quality
        },
        sentences=[sentence(report, row) for row in good],
        level_ids=list(dict.fromkeys(level.id for row in good for level in row.levels)),
    )


def plots(rows: list[Row], places: dict[str, int]) -> dict[str, str]:
    """Name -> SVG; a plot without values is left out."""
    if not rows:
        return {}
    drawn = {
        "tokens": bars(
            [
                (
                    level.label,
                    [(row.name, places[row.name], speed(row, level.id)) for row in rows],
                )
                for level in rows[0].levels
                if level.is_closed
            ],
            "output tokens/s",
        ),
        "memory": stacks([(row.name, memory_parts(row)) for row in rows], "MB"),
        "quality": scatter(
            [
                (row.name, places[row.name], row.memory.weight_bytes / 1e6, row.quality.perplexity)
                for row in rows
                if row.memory and row.quality
            ],
            "weights, MB",
            "perplexity",
        ),
    }
    curves = [
        Series(
            row.name,
            places[row.name],
            [
                (1e3 * seconds, percent / 100)
                for seconds, percent in zip(level.itl_curve_s, CURVE_PERCENTS, strict=True)
            ],
        )
        for row in rows
        for level in row.levels
        if not level.is_closed and level.itl_curve_s
    ]
    # a client that is kept from running reads many tokens at once; gaps of 0 have no logarithm
    if any(milliseconds > 0 for curve in curves for milliseconds, _ in curve.points):
        drawn["gaps"] = distribution(curves, "ms between two tokens (logarithmic)")
    return drawn


def memory_parts(row: Row) -> list[tuple[str, float]]:
    """Weights by kind, the KV pool, and what else the process held at its peak; in MB."""
    assert row.memory is not None
    parts = row.memory.parts
    weights = {
        part.removeprefix("weights."): size for part, size in parts.items() if part.startswith("weights.")
    }
    named = {
        "codes and 16-bit linears": weights.pop("codes", 0) + weights.pop("linear16", 0),
        "scales, zeros, codebooks": sum(weights.pop(name, 0) for name in ("scales", "zeros", "codebooks")),
        "embedding, head, norms": sum(weights.values()),
        "KV pool": row.memory.kv_bytes,
    }
    rest = row.memory.peak_bytes - row.memory.weight_bytes - row.memory.kv_bytes
    named["everything else at the peak"] = max(rest, 0)
    return [(name, size / 1e6) for name, size in named.items()]


def speed(row: Row, level_id: str) -> float:
    found = row.figure("output_tokens_per_s", level_id)
    return found.estimate if found else 0.0


def sentence(report: Report, row: Row) -> str:
    """One mode in words, against the reference."""
    base, level = report.reference_row, report.workload.throughput_level
    assert row.memory is not None
    if base is None or base.memory is None or not (base.quality and row.quality and speed(base, level)):
        return f"{row.name} is measured, and there is no reference to tell it against."
    if row is base:
        quality = (
            f"perplexity {row.quality.perplexity:.2f}" if report.judges_quality else "no verdict on quality"
        )
        return (
            f"{row.name} is the reference: {row.memory.weight_bytes / 1e6:,.0f} MB of weights, "
            f"{speed(row, level):,.0f} tokens/s, {quality}."
        )
    bytes_ratio = row.memory.weight_bytes / base.memory.weight_bytes
    loss = 100 * (row.quality.perplexity / base.quality.perplexity - 1)
    quality = (
        f"its perplexity is {abs(loss):.1f} % {'higher' if loss >= 0 else 'lower'}"
        if report.judges_quality
        else "there is no verdict on its quality"
    )
    said = (
        f"{row.name} holds its weights in {100 * bytes_ratio:.0f} % of the bytes of {base.name}, "
        f"writes {speed(row, level) / speed(base, level):.2f} times as many tokens/s, and {quality}."
    )
    if row.purchase and row.purchase.more_kv_tokens:
        gained = row.purchase.more_kv_tokens
        verb = "frees" if gained > 0 else "adds"
        said += f" The bytes it {verb} are worth {abs(gained):,d} tokens of KV cache."
    return said
