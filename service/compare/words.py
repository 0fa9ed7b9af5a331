"""The sentences of a report that are not on one mode: what was measured, and what that can support.

assemble --Model, Device, Workload--> first_line(), supports(), place_of() --> report
"""

from collections.abc import Sequence

from service.compare.plan import Plan
from service.compare.report import Device, Model, Report, Row, Workload

NO_VERDICT = (
    "The weights are random: there is no verdict on quality. Perplexity, divergence and agreement show that "
    "the instrument runs, and nothing about a precision."
)


def first_line(model: Model, device: Device, workload: Workload, rows: Sequence[Row]) -> str:
    """Model, device, workload."""
    kind = "random parameters" if model.random_weights else "parameters"
    size = f" ({model.architecture}, {model.num_parameters / 1e6:.1f} M {kind})" if model.architecture else ""
    return (
        f"{model.name}{size} on {device.name} ({device.kind}); {traffic(rows)}, {workload.prompts}, "
        f"{workload.output_tokens} output tokens each"
    )


def traffic(rows: Sequence[Row]) -> str:
    """`1 and 4 streams, Poisson arrivals at 2.5, 5 and 7.6 requests/s`."""
    levels = next((row.levels for row in rows if row.levels), [])
    streams = listed([str(level.concurrency) for level in levels if level.is_closed])
    rates = listed([f"{level.rate_per_s:g}" for level in levels if not level.is_closed])
    return f"{streams} streams, Poisson arrivals at {rates} requests/s" if levels else "no load"


def place_of(report: Report) -> str:
    """What a verdict is on."""
    slo = f" and {report.workload.slo.said}" if report.workload.slo else ""
    return f"{report.model.name} on {report.device.name} under this traffic{slo}"


def supports(plan: Plan, model: Model, num_repeats: int) -> str:
    """What the figures can carry."""
    repeats = (
        "Each speed is one run without repeats, so a difference of a few percent is not evidence."
        if num_repeats < 2
        else f"Each speed is the mean of {num_repeats} engines' runs in an interleaved order; a difference "
        "counts where its interval says so."
    )
    if model.random_weights:
        return (
            f"{NO_VERDICT} report.json and report.csv keep them. Speed and bytes hold for the shape of "
            f"{model.name} on this device and load. {repeats}"
        )
    if plan.settings.model == "demo":
        return (
            "This is the demo model: the report shows the instrument, not the answer. What a precision costs "
            f"and gains here says nothing about a larger model or another device. {repeats}"
        )
    return f"These figures hold for {model.name} on this device under this load. {repeats}"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    *first, last = names or [""]
    return f"{', '.join(first)} and {last}" if first else last
