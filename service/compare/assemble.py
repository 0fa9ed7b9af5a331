"""Finished rows and the words around them -> Report.

job --Finished rows, failures--> build_report() --Report--> export, page
"""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from loadtest.prompts import Prompts
from service import __version__
from service.compare.plan import Plan
from service.compare.report import FORMAT, Device, Model, Report, Row, Text, Turn, Workload, purchase
from service.compare.windows import EvaluationText
from service.cores import physical_cores

NO_VERDICT = (
    "The weights are random: there is no verdict on quality. Perplexity, divergence and agreement show that "
    "the instrument runs, and nothing about a precision."
)
RATE_RULE = "half of the request rate that the first mode reached with the most streams"


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """What a mode's file holds: its row and what later rows and the report take from it."""

    row: Row
    model: Model | None
    device: str
    device_name: str
    torch_version: str
    rate_per_s: float


def build_report(
    plan: Plan,
    text: EvaluationText,
    prompts: Prompts,
    done: dict[int, Finished],
    failures: dict[int, Row],
) -> Report:
    """Rows in the order asked, with what each one's saving buys and the words around them."""
    options = plan.options
    place = plan.precisions.index(plan.reference)
    reference = done[place].row if place in done else None
    tokens = request_tokens(reference)
    rows = [
        msgspec.structs.replace(done[n].row, purchase=purchase(done[n].row, reference, tokens))
        if n in done
        else failures[n]
        for n in range(len(plan.precisions))
        if n in done or n in failures
    ]
    first = next(iter(done.values()), None)
    model = (first and first.model) or Model(
        name=plan.settings.name, path=str(plan.model_path), architecture="", num_parameters=0
    )
    device = Device(
        kind=first.device if first else plan.settings.device,
        name=first.device_name if first else platform.machine(),
        threads=plan.settings.threads,
    )
    workload = Workload(
        prompts=f"{len(prompts.items)} texts of {prompts.source}",
        prompts_sha256=prompts.sha256,
        seed=options.seed,
        rate_rule="as asked" if options.rate_per_s else RATE_RULE,
        output_tokens=options.output_tokens,
        kv_tokens=plan.settings.kv_tokens,
        num_repeats=1,
        max_repeats=1,
        throughput_level=f"closed-{max(options.concurrencies)}",
        latency_level="open",
        deterministic=plan.settings.deterministic,
    )
    return Report(
        format=FORMAT,
        first_line=first_line(
            plan, model, device, workload, first.rate_per_s if first else options.rate_per_s
        ),
        supports=supports(plan, model),
        complete=len(done) == len(plan.precisions),
        not_measured=[
            precision for n, precision in enumerate(plan.precisions) if n not in done and n not in failures
        ],
        reference=plan.reference,
        model=model,
        device=device,
        workload=workload,
        text=Text(
            name=text.text.name,
            sha256=text.text.sha256,
            python=text.text.python,
            calibration_name=text.calibration.name,
            calibration_sha256=text.calibration.sha256,
            num_windows=len(text.windows),
            window_tokens=len(text.windows[0]),
            protocol=text.protocol,
        ),
        rows=rows,
        schedule=[Turn(order=n, repeat=0, mode=precision) for n, precision in enumerate(plan.precisions)],
        environment=environment(first),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=sum(row.seconds for row in rows),
    )


def first_line(plan: Plan, model: Model, device: Device, workload: Workload, rate_per_s: float) -> str:
    """Model, device, workload."""
    size = (
        f" ({model.architecture}, {model.num_parameters / 1e6:.1f} M {parameters(model)})"
        if model.architecture
        else ""
    )
    streams = " and ".join(str(width) for width in sorted(plan.options.concurrencies))
    return (
        f"{model.name}{size} on {device.name} ({device.kind}); {streams} streams and Poisson arrivals at "
        f"{rate_per_s:g} requests/s, {workload.prompts}, {workload.output_tokens} output tokens each"
    )


def request_tokens(row: Row | None) -> float:
    """Prompt and answer together, mean over every request that was answered."""
    runs = [run for level in row.levels for run in level.runs] if row else []
    num_requests = sum(run.num_ok for run in runs)
    tokens = sum(run.prompt_tokens + run.output_tokens for run in runs)
    return tokens / num_requests if num_requests else 0.0


def parameters(model: Model) -> str:
    return "random parameters" if model.random_weights else "parameters"


def supports(plan: Plan, model: Model) -> str:
    """What the figures can carry. Speed is one run; the demo model is an instrument check."""
    if model.random_weights:
        return (
            f"{NO_VERDICT} Speed and bytes hold for the shape of {model.name} on this device and load. "
            "Each speed is one run without repeats, so a difference of a few percent is not evidence."
        )
    if plan.settings.model == "demo":
        return (
            "This is the demo model: the report shows the instrument, not the answer. What a precision costs "
            "and gains here says nothing about a larger model or another device. Each speed is one run."
        )
    return (
        f"These figures hold for {model.name} on this device under this load. Each speed is one run without "
        "repeats, so a difference of a few percent between two modes is not evidence."
    )


def environment(first: Finished | None) -> dict[str, str]:
    return {
        "halftone": __version__,
        "commit": commit(),
        "torch": first.torch_version if first else "",
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": f"{platform.machine()}, {physical_cores()} cores usable",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def commit() -> str:
    """Commit of the source tree that runs, `+` where it was changed since; empty outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
