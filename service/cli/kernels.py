"""`halftone bench --kernels`: the linears' kernels of one layer on this machine -> tables and JSON.

flags --Plan--> kernel_bench.measure() --result--> table, `--json FILE`. No server is needed, and none asked.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from service import logs
from service.cli.display import Display
from service.cli.flags import with_settings
from service.config import Settings, load_settings
from service.disk import told_disk_errors
from service.errors import SettingError
from service.precision.spec import split_list

if TYPE_CHECKING:
    import torch

SETTINGS = ("device", "dtype", "threads", "cpu_kernels", "load_seed", "revision", "log_level", "log_format")
NARROWEST = 110  # columns of the table where nobody looks at a terminal

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.command()
@with_settings(without=[name for name in Settings.model_fields if name not in SETTINGS])
def kernels(
    *,
    model: Annotated[
        str, typer.Option(help="Whose shape: `preset:NAME`, a folder with config.json, a hub id.")
    ] = "preset:llama-3.1-8b",
    rows: Annotated[str, typer.Option(help="Rows of x, each with a table of its own.")] = "1,16,64,256,1024",
    precisions: Annotated[
        str, typer.Option(help="Modes, each as for `serve --precision`; empty: all there are.")
    ] = "",
    outliers: Annotated[
        str, typer.Option(help="Columns of x beyond LLM.int8()'s threshold, for int8: 0,3,32,256 is a sweep.")
    ] = "32",
    repeats: Annotated[int, typer.Option(min=1, help="Runs that a median is taken of.")] = 15,
    out: Annotated[Path | None, typer.Option("--json", help="File for the whole result.")] = None,
    **settings: Any,
) -> None:
    """Time the linears of one layer in every precision, beside cuBLAS, bitsandbytes and torch's int4.

    Weights are random, built as `serve` builds them. `--dtype` is that of activations where a mode has the
    choice; `auto` is fp16 on a GPU and bf16 on a CPU.
    """
    given = load_settings(model=model, load_format="random", **settings)
    logs.configure("warning" if given.log_level == "info" else given.log_level, given.log_format)
    num_rows = numbers("rows", rows, least=1)
    columns = numbers("outliers", outliers, least=0)
    if out is not None and out.exists():
        raise SettingError(f"`--json {out}` exists", hint="name a new file")
    with Display() as display:
        result = measured(given, split_list(precisions), num_rows, columns, repeats, display)
    from service.kernel_bench.table import show

    if out is not None:
        with told_disk_errors(out):
            out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=NARROWEST)
    show(result, console)


def numbers(name: str, text: str, least: int) -> list[int]:
    """`1,16` -> [1, 16], in their order, each once."""
    found: list[int] = []
    for piece in text.split(","):
        if not piece.strip().isdecimal() or int(piece) < least:
            raise SettingError(
                f"`--{name} {text}`: `{piece}` is no whole number of at least {least}",
                hint="whole numbers, joined by commas",
            )
        if int(piece) not in found:
            found.append(int(piece))
    return found


def measured(
    settings: Settings,
    precisions: list[str],
    rows: list[int],
    outliers: list[int],
    repeats: int,
    display: Display,
) -> dict[str, Any]:
    """Raises HalftoneError."""
    from service import device as devices
    from service.cli.model import find_model
    from service.kernel_bench.measure import Plan, measure
    from service.kernels import cuda, native

    settings, path = find_model(settings, display)
    device = devices.resolve(settings.device)
    if device.type == "cpu":
        devices.set_threads(settings.threads)
        native.choose(settings.cpu_kernels)
    else:
        cuda.keep_in(settings.cache_dir)
    dtype = dtype_of(settings, device)
    plan = Plan(path, device, dtype, precisions, rows, outliers, repeats, settings.load_seed)
    return measure(plan, settings.model, display)


def dtype_of(settings: Settings, device: "torch.device") -> "torch.dtype":
    from service.precision.full import DTYPES

    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    return DTYPES["fp16" if device.type == "cuda" else "bf16"]
