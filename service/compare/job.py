"""`halftone compare`: each mode in turn in a fresh engine, the same prompts and arrivals, one report.

cli --settings, precisions, out--> run_compare() --Jobs--> mode.measure, and Rows --> report, page, exports

A finished mode is a file in `--out`, so a run that was stopped goes on where it was.
"""

from collections.abc import Awaitable, Callable, Sequence
from importlib import import_module
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loadtest.prompts import DEFAULT_PROMPTS, Prompts
from service.compare.assemble import Finished, build_report
from service.compare.export import write_report
from service.compare.files import read_back, write_whole
from service.compare.forms.tables import print_report
from service.compare.mode import STAGES, Advance, Job, Measured, measure
from service.compare.plan import CompareOptions, Plan, claim
from service.compare.report import Mode, Report, Row
from service.compare.windows import EvaluationText
from service.config import Settings
from service.errors import HalftoneError, SettingError
from service.front.host import AppFactory, run_to_end
from service.front.supervisor import ENGINE_COMMAND

Measure = Callable[[Job, Advance], Awaitable[Measured]]


def run_compare(
    settings: Settings,
    model_path: Path,
    precisions: list[str],
    out: Path,
    options: CompareOptions | None = None,
    *,
    app_factory: AppFactory | None = None,
    console: Console | None = None,
    command: Sequence[str] = ENGINE_COMMAND,
    measure_mode: Measure = measure,
) -> Report:
    """Measures every mode that `out` does not hold yet, writes the report there and prints its table.

    A mode that fails becomes a row that says why. Ctrl-C and SIGTERM write a report of what is measured and
    are raised again, as KeyboardInterrupt and SystemExit. Raises PrecisionError, SettingError and
    SystemProblem before anything is measured.
    """
    options = options or CompareOptions()
    console = console or Console()
    check(options)
    plan = Plan.make(settings, model_path, precisions, options)
    text = EvaluationText.prepare(
        options.text,
        settings.calibration,
        settings.tokenizer_folder(model_path),
        options.num_windows,
        options.window_tokens,
    )
    prompts = load_prompts(options)
    claim(out, plan)
    done: dict[int, Finished] = {}
    for place in range(len(plan.precisions)):
        path = out / plan.row_file(place)
        if path.is_file():
            done[place] = read_back(path, Finished)
            console.print(f"{plan.precisions[place]}: measured before, kept")
    if app_factory is None:
        app_factory = import_module("service.api.app").create_app
    failures: dict[int, Row] = {}
    run = Run(plan, text, out, app_factory, command, measure_mode, console, done, failures)
    try:
        run_to_end(run.all_modes())
    except (KeyboardInterrupt, SystemExit):
        console.print("stopped; the same command goes on from here")
        raise
    finally:
        report = build_report(plan, text, prompts, done, failures)
        if report.rows:
            write_report(report, out)
            print_report(report, out, console)
    return report


class Run:
    """The modes one after another, with one bar for all of them."""

    def __init__(
        self,
        plan: Plan,
        text: EvaluationText,
        out: Path,
        app_factory: AppFactory,
        command: Sequence[str],
        measure_mode: Measure,
        console: Console,
        done: dict[int, Finished],
        failures: dict[int, Row],
    ) -> None:
        self.plan, self.text, self.out = plan, text, out
        self.app_factory, self.command, self.measure_mode = app_factory, command, measure_mode
        self.console, self.done, self.failures = console, done, failures

    async def all_modes(self) -> None:
        rest = [place for place in range(len(self.plan.precisions)) if place not in self.done]
        whole = sum(STAGES.values())
        with Progress(
            TextColumn("{task.description:<26}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=3600,  # stages differ in speed: the mean since the start is the best guess
            transient=True,
        ) as bar:
            task = bar.add_task("", total=whole * len(rest))
            for number, place in enumerate(rest):
                await self.one_mode(place, stage_bar(bar, task, self.plan.precisions[place], whole * number))
                bar.update(task, completed=whole * (number + 1))

    async def one_mode(self, place: int, advance: Advance) -> None:
        job = Job(self.plan, place, self.text, self.settled_rate, self.out, self.app_factory, self.command)
        try:
            measured = await self.measure_mode(job, advance)
        except HalftoneError as error:
            self.failures[place] = Row(
                mode=Mode(name=job.precision, precision=job.precision), status="failed", error=str(error)
            )
            self.console.print(f"[red]{job.precision}: failed:[/red] {error.message}", highlight=False)
            return
        finished = Finished(
            row=measured.row,
            model=measured.model,
            device=measured.device,
            device_name=measured.device_name,
            torch_version=measured.torch_version,
            rate_per_s=measured.rate_per_s,
        )
        write_whole(self.out / self.plan.row_file(place), msgspec.json.encode(finished))
        self.done[place] = finished

    @property
    def settled_rate(self) -> float:
        """The open loop's rate, once the first mode has found it."""
        return next((finished.rate_per_s for finished in self.done.values()), 0.0)


def stage_bar(bar: Progress, task: TaskID, precision: str, start: float) -> Advance:
    """-> what a mode calls to move the bar: stages in order, each with its rough share."""
    names = list(STAGES)
    furthest = start

    def advance(stage: str, share: float) -> None:
        nonlocal furthest
        before = sum(STAGES[name] for name in names[: names.index(stage)])
        # stages of the engine each count from nothing: the bar waits, it does not go back
        furthest = max(furthest, start + before + STAGES[stage] * min(share, 1.0))
        bar.update(task, completed=furthest, description=f"{precision}: {stage}")

    return advance


def check(options: CompareOptions) -> None:
    """Raises SettingError for amounts that measure nothing."""
    positive = {
        "concurrencies": min(options.concurrencies, default=0),
        "requests_per_stream": options.requests_per_stream,
        "num_open_requests": options.num_open_requests,
        "output_tokens": options.output_tokens - 1,
        "num_windows": options.num_windows,
    }
    for name, value in positive.items():
        if value < 1:
            raise SettingError(f"compare option `{name}` = `{getattr(options, name)}` is too small")
    each = options.agreement_tokens // min(8, options.num_windows)
    if each + 1 > options.window_tokens:
        raise SettingError(
            f"compare option `agreement_tokens` = `{options.agreement_tokens}` needs windows of {each + 1} "
            f"tokens, and they have {options.window_tokens}"
        )


def load_prompts(options: CompareOptions) -> Prompts:
    """Raises SettingError for a file that holds no prompts."""
    try:
        return Prompts.load(Path(options.prompts) if options.prompts else DEFAULT_PROMPTS)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"prompts `{options.prompts}` cannot be used: {error}",
            hint='write one object a line: {"prompt": "..."}',
        ) from None
