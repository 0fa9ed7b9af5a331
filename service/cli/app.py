"""The command line: what each command takes. What it does is imported when it runs.

halftone COMMAND --typer--> settings, options --> cli/<command>, compare/, quantize/
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service import __version__
from service.cli.flags import with_settings
from service.config import Settings, load_settings
from service.errors import SettingError
from service.plan.question import PARAMETERS

app = typer.Typer(
    name="halftone",
    help="One server, one checkpoint, every precision, measured the same way.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Model = Annotated[
    str | None,
    typer.Argument(
        help="`demo`, a local folder, a hub id such as ORG/NAME, or `preset:NAME`. (default demo)",
        show_default=False,
    ),
]
SERVER_SETTINGS = (
    *("host", "port", "metrics_port", "api_key", "admin_key", "served_model_name", "chat_template"),
    *("max_queue_requests", "max_body_bytes", "max_n", "max_prompts", "drain_timeout_s", "swap_wait_s"),
    *("resident", "metrics_compat", "allowed_origins", "time_kernels"),
)
MORE = "`halftone bench --kernels --help`: microseconds of the linears of a layer on this machine instead."
ASKED = {parameter.name: parameter.help for parameter in PARAMETERS}
PLANNED = (
    *("revision", "cache_dir", "head", "kv_memory_fraction", "max_context_tokens"),
    *("max_batch_requests", "max_batch_tokens", "log_level", "log_format"),
)
QUANTIZED = (
    *("revision", "cache_dir", "device", "threads", "calibration", "tokenizer", "log_level", "log_format"),
    *("load_format", "load_seed", "random_outliers", "random_std"),
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"halftone {__version__}")
        raise typer.Exit


@app.command()
@with_settings(without=["model"])
def serve(model: Model = None, **settings: Any) -> None:
    """Serve a model until Ctrl-C. Flags are also variables (HALFTONE_PORT) and lines of halftone.toml."""
    checked = load_settings(model=model, **settings)
    from service.cli.serve import serve

    serve(checked)


@app.command()
@with_settings(without=["model", "precision", "save", *SERVER_SETTINGS])
def compare(
    context: typer.Context,
    model: Model = None,
    *,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Measure nothing: what changed from one report.json to another; 1 if it is worse."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Of --diff: share by which a figure may be worse. (default 0.02)"),
    ] = None,
    precisions: Annotated[
        str,
        typer.Option(
            help="Modes, as for `serve --precision`, or `awq=CHECKPOINT`, which has its own; empty: 16 bits, "
            "int8, nf4, awq."
        ),
    ] = "",
    kv_dtypes: Annotated[
        str, typer.Option(help="Types of the KV cache, each with every precision: auto, int8, fp8.")
    ] = "",
    server: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL", help="A running OpenAI-compatible server as a column of speed alone."
        ),
    ] = None,
    reference: Annotated[
        str, typer.Option(help="Mode that others are told against; empty: the first of 16 bits.")
    ] = "",
    out: Annotated[
        Path, typer.Option(help="Folder for report.json and report.html: new, or of a stopped run.")
    ] = Path("report"),
    levels: Annotated[
        str,
        typer.Option(
            help="Load: `4` streams, `2.5/s` requests, `60%` of what the reference can; empty: by device."
        ),
    ] = "",
    slo: Annotated[
        str, typer.Option(help="Limits on a request, such as ttft=500ms,itl=30ms: goodput, and the verdict.")
    ] = "",
    repeats: Annotated[int | None, typer.Option(min=1, help="Engines for each mode. (default 3)")] = None,
    max_repeats: Annotated[
        int | None, typer.Option(min=1, help="As many where those cannot resolve 5 %. (default 6)")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="No repeat more that would end later. (default 10, on a GPU 15)"),
    ] = None,
    max_perplexity_rise: Annotated[
        float | None,
        typer.Option(min=0, help="Share by which it may rise in a mode to deploy. (default 0.05)"),
    ] = None,
    output_tokens: Annotated[
        int | None, typer.Option(min=2, help="Of each answer. (default 32, on a GPU 64)")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text for perplexity; empty: the half of Python's documentation kept for it.")
    ] = "",
    prompts: Annotated[
        str,
        typer.Option(help="Your traffic, for load and divergence: one JSON object a line; empty: our own."),
    ] = "",
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, arrivals and the order of modes.")] = 0,
    **settings: Any,
) -> None:
    """Measure the precisions in turn under the same load, and write one report with a verdict."""
    checked = load_settings(model=model, **settings)
    if diff is not None or tolerance is not None:
        from service.cli.diff import compare_reports

        compare_reports(context, diff, tolerance)
        return
    from service.cli.compare import compare

    given = {
        "repeats": repeats,
        "max_repeats": max_repeats,
        "minutes": minutes,
        "max_perplexity_rise": max_perplexity_rise,
        "output_tokens": output_tokens,
        "text": text,
        "prompts": prompts,
        "seed": seed,
    }
    compare(
        checked,
        precisions,
        out,
        kv_dtypes=kv_dtypes,
        servers=server or (),
        reference=reference,
        levels=levels,
        slo=slo,
        given=given,
    )


@app.command()
@with_settings(without=[name for name in Settings.model_fields if name not in QUANTIZED])
def quantize(
    model: Model = None,
    *,
    precision: Annotated[
        str, typer.Option(help="Calibrated mode to make, as for `serve --precision`.")
    ] = "awq",
    out: Annotated[Path, typer.Option(help="New folder for the quantized checkpoint.")],
    **settings: Any,
) -> None:
    """Write a quantized checkpoint that this server and others load."""
    checked = load_settings(model=model, **settings)
    from service.engine.child import set_threads

    set_threads(checked.threads)  # this process computes, as an engine's does
    from service.cli.quantize import quantize

    quantize(checked, precision, out)


@app.command("eval")
@with_settings(without=["model", "save", *SERVER_SETTINGS])
def evaluate(
    model: Model = None,
    *,
    reference: Annotated[
        str,
        typer.Option(help="16- or 32-bit mode that divergence is measured against; empty: no divergence."),
    ] = "",
    reference_model: Annotated[
        str,
        typer.Option(
            help="Checkpoint of the reference where it is another, as for MODEL: what a quantized one was "
            "made from."
        ),
    ] = "",
    text: Annotated[
        str,
        typer.Option(
            help="UTF-8 file, JSON lines with a field `text`, or `wikitext-2` or `c4` of the hub; empty: the "
            "half of Python's documentation kept for evaluation."
        ),
    ] = "",
    protocol: Annotated[
        str,
        typer.Option(
            help="What perplexity is of, one or more: halftone, gptq-2048, aqlm-4096, aqlm-8192, "
            "lm-eval-word, llama.cpp-512."
        ),
    ] = "halftone",
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Windows of text to score. (default 8 of `halftone`, all of the others)",
            show_default=False,
        ),
    ] = None,
    window_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens in one window of `halftone`; all but the first are scored.")
    ] = 513,
    decode_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens scored again by decode, one and eight sequences; 0: none.")
    ] = 2048,
    prompts: Annotated[
        str,
        typer.Option(
            help="Prompts to answer greedily beside the reference, one JSON object a line; empty: ours."
        ),
    ] = "",
    greedy_tokens: Annotated[
        int, typer.Option(min=0, help="Most tokens of each greedy answer; 0: none are made.")
    ] = 64,
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks of lm-evaluation-harness (the extra `tasks`), comma-separated, instead of texts."
        ),
    ] = "",
    task_path: Annotated[str, typer.Option(help="With --tasks: folder with task YAMLs of your own.")] = "",
    limit: Annotated[
        int, typer.Option(min=0, help="With --tasks: documents of each task; 0: all.", show_default=False)
    ] = 0,
    fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="With --tasks: examples before each question. (default: the task's own)"),
    ] = None,
    through: Annotated[
        Literal["engine", "http", "both"],
        typer.Option(help="With --tasks: in process, by /v1/completions, or both, which have to agree."),
    ] = "both",
    out: Annotated[Path | None, typer.Option(help="File for the result as JSON.")] = None,
    **settings: Any,
) -> None:
    """Perplexity of one precision and its divergence from a reference, or its scores in tasks."""
    checked = load_settings(model=model, **settings)
    from service.cli.evaluate import Asked, evaluate

    asked = Asked(
        reference=reference,
        text=text,
        protocols=protocol,
        windows=windows or 0,
        window_tokens=window_tokens,
        decode_tokens=decode_tokens,
        prompts=prompts,
        greedy_tokens=greedy_tokens,
        reference_model=reference_model,
    )
    of_tasks = (task_path, limit, fewshot, through) != ("", 0, None, "both")
    if (tasks and asked != Asked()) or (of_tasks and not tasks):
        raise SettingError(
            "`--tasks` with --task-path, --limit, --fewshot, --through asks for tasks, the other options for "
            "texts; both were given"
            if tasks
            else "--task-path, --limit, --fewshot, --through need `--tasks`",
            hint="run the command once for each",
        )
    if not tasks:
        evaluate(checked, asked, out)
        return
    from service.cli.tasks import evaluate_tasks
    from service.harness.run import TaskRun

    names = [name.strip() for name in tasks.split(",")]
    run = TaskRun(tasks=names, include=task_path, limit=limit, num_fewshot=-1 if fewshot is None else fewshot)
    evaluate_tasks(checked, run, through, out)


@app.command()
def swap(
    precision: Annotated[str, typer.Argument(help="As for `serve --precision`.", show_default=False)],
    *,
    url: Annotated[str, typer.Option(help="Of the running server.")] = "http://127.0.0.1:8000",
    admin_key: Annotated[
        str | None, typer.Option(help="That it was started with. (default HALFTONE_ADMIN_KEY)")
    ] = None,
    drain_timeout_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds for open requests, before it is given up. (default the server's)"),
    ] = None,
) -> None:
    """Have a running server serve another precision of its checkpoint; see docs/live-precision.md."""
    from service.cli.swap import swap

    swap(url, load_settings(admin_key=admin_key).admin_key, precision, drain_timeout_s)


@app.command()
@with_settings(without=[name for name in Settings.model_fields if name not in PLANNED])
def plan(
    model: Model = None,
    *,
    gpu: Annotated[str, typer.Option(help=ASKED["gpu"])] = "",
    bandwidth: Annotated[str, typer.Option(help=ASKED["bandwidth"])] = "",
    context: Annotated[str, typer.Option(help=ASKED["context"])] = "",
    concurrency: Annotated[str, typer.Option(help=ASKED["concurrency"])] = "",
    precisions: Annotated[str, typer.Option(help=ASKED["precisions"])] = "",
    kv_dtype: Annotated[str, typer.Option(help=ASKED["kv_dtype"])] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON.")] = False,
    **settings: Any,
) -> None:
    """Which precisions fit a GPU, and what they leave for users: from headers alone, nothing is loaded."""
    checked = load_settings(model=model, **settings)
    from service.cli.plan import plan

    asked = {
        "gpu": gpu, "bandwidth": bandwidth, "context": context, "concurrency": concurrency,
        "precisions": precisions, "kv_dtype": kv_dtype,
    }  # fmt: skip
    plan(checked, asked, as_json=as_json)


@app.command()
@with_settings(without=["model"])
def doctor(**settings: Any) -> None:
    """Check this machine; exit code 1 and a fix for whatever would stop `serve`."""
    checked = load_settings(**settings)
    from service.cli.doctor import doctor

    raise typer.Exit(doctor(checked))


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench(
    context: typer.Context,
    kernels: Annotated[bool, typer.Option("--kernels", help="Time kernels instead; no server.")] = False,
) -> None:
    """Measure a running server under load, any with OpenAI's API; with --kernels, a layer's linears here."""
    if kernels:
        from service.cli.kernels import app as measure_kernels

        measure_kernels(context.args, prog_name="halftone bench --kernels", standalone_mode=False)
        return
    from loadtest.__main__ import main

    # its flags are its own: it knows the API, and nothing of this server
    raise typer.Exit(main(context.args, "halftone bench", MORE))


@app.command(hidden=True)
def reference(table: Annotated[Literal["settings", "metrics"], typer.Argument()]) -> None:
    """Print docs/settings.md or docs/metrics.md, which tests compare with the code."""
    from service.cli.reference import PAGES

    typer.echo(PAGES[table](), nl=False)
