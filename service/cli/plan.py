"""`halftone plan`: which precisions of a model fit a GPU -> a table and a sentence, or JSON."""

import json

from rich.console import Console
from rich.table import Table

from service import logs
from service.cli.display import Display
from service.config import Settings
from service.disk import megabytes
from service.errors import SettingError
from service.plan.devices import Device, find_device
from service.plan.estimate import Serving
from service.plan.plan import Plan, PlannedMode, Server, make_plan, to_json
from service.plan.question import Question, read_question
from service.plan.shape import Shape, find_shape
from service.precision import backend_of

MAX_BATCH_REQUESTS, STEP_TOKENS = 256, 2048  # of a server on a GPU whose user does not say
NARROWEST = 110  # columns of the table where nobody looks at a terminal


def plan(settings: Settings, asked: dict[str, str], *, as_json: bool) -> None:
    """`asked`: question.PARAMETERS by name. Raises HalftoneError."""
    logs.configure("warning" if settings.log_level == "info" else settings.log_level, settings.log_format)
    question = read_question({name: value for name, value in asked.items() if value})
    if not question.gpu:
        raise SettingError(
            "`--gpu` is needed: a name or a size of memory", hint="`--gpu h100-80gb`, or `--gpu 24GiB`"
        )
    device = find_device(question.gpu, question.bandwidth)
    with Display() as display:
        shape = find_shape(settings.model, settings.revision, settings.cache_dir, display)
    found = planned(settings, shape, device, question)
    console = Console(highlight=False, soft_wrap=as_json)
    if as_json:
        console.print(json.dumps(to_json(found), indent=2), markup=False)
        return
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    show(found, console)


def planned(settings: Settings, shape: Shape, device: Device, question: Question) -> Plan:
    own = backend_of(shape.quantization) if shape.quantization else None
    if shape.quantization and own is None:
        method = shape.quantization.get("quant_method", "unknown")
        raise SettingError(
            f"`{settings.model}` is quantized by `{method}`, which no precision reads",
            hint="plan for the 16-bit checkpoint it was made from",
        )
    serving = Serving(
        settings.max_batch_requests or MAX_BATCH_REQUESTS,
        settings.max_batch_tokens or STEP_TOKENS,
        settings.kv_memory_fraction,
        settings.head,
        max_context_tokens=settings.max_context_tokens,
    )
    server = Server(serving=serving)
    return make_plan(settings.name, shape, device, question, server, own.canonical if own else "")


def show(found: Plan, console: Console) -> None:
    speed = f", {found.bandwidth_bytes_per_s / 1e9:,.0f} GB/s" if found.bandwidth_bytes_per_s else ""
    console.print(
        f"{found.model} ({found.architecture}, {found.num_parameters / 1e6:,.0f} M parameters) on "
        f"{found.device} ({found.device_bytes / (1 << 30):.1f} GiB{speed}),\n"
        f"{found.concurrency:,} requests at once of {found.context_tokens:,} tokens each",
        markup=False,
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("precision")
    for column in ("weights", "needs", "KV tokens", "requests", "tokens/s", "of one"):
        table.add_column(column, justify="right")
    table.add_column("holds it")
    for mode in found.modes:
        table.add_row(*cells(mode))
    console.print(table)
    console.print(found.why, markup=False)
    console.print(
        "needs: device memory for all of these requests; tokens/s: the most that bandwidth and arithmetic "
        "allow (roofline).",
        markup=False,
    )


def cells(mode: PlannedMode) -> tuple[str, ...]:
    name = mode.precision if mode.kv_dtype == "auto" else f"{mode.precision}, KV {mode.kv_dtype}"
    if not mode.parts:
        return (name, "", "", "", "", "", "", mode.verdict)
    return (
        name,
        megabytes(mode.weight_bytes),
        megabytes(mode.needed_bytes),
        f"{mode.kv_tokens:,}",
        f"{mode.max_requests:,}",
        f"{mode.tokens_per_s:,.0f}" if mode.tokens_per_s else "-",
        f"{mode.one_request_tokens_per_s:,.0f}" if mode.one_request_tokens_per_s else "-",
        mode.verdict,
    )
