"""`halftone compare`: turn after turn, each mode in fresh engines, the same prompts and arrivals, one report.

cli --settings, modes, out--> run_compare() --Jobs--> mode.measure, and Finished --> assemble, exports

A finished turn is a file in `--out`, so a run that was stopped goes on where it was.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from time import monotonic

import msgspec
from rich.console import Console

from loadtest.prompts import DEFAULT_PROMPTS, Prompt, Prompts
from service.compare.assemble import Turns, build_report
from service.compare.export import write_report
from service.compare.files import read_back, write_whole
from service.compare.forms.tables import print_report
from service.compare.mode import Advance, Finished, Job, look, measure
from service.compare.options import CompareOptions, check
from service.compare.plan import RATES_FILE, Plan, Rates, claim
from service.compare.progress import Pace
from service.compare.report import Fit, Mode, Report, Row, Turn
from service.compare.windows import EvaluationText
from service.config import Settings
from service.errors import HalftoneError, SettingError, ShortageError
from service.front.host import AppFactory, run_to_end
from service.front.supervisor import ENGINE_COMMAND
from service.front.text import TextCodec

Measure = Callable[[Job, Advance], Awaitable[Finished]]
Look = Callable[[Job, Advance], Awaitable[Rates]]
GREEDY_PROMPTS = 16


def run_compare(
    settings: Settings,
    model_path: Path,
    modes: Sequence[Mode],
    out: Path,
    options: CompareOptions,
    *,
    reference: str = "",
    checkpoints: Mapping[str, Path] | None = None,
    app_factory: AppFactory | None = None,
    console: Console | None = None,
    command: Sequence[str] = ENGINE_COMMAND,
    measure_turn: Measure = measure,
    first_look: Look = look,
) -> Report:
    """Measures every turn that `out` does not hold yet, writes the report there and prints its table.

    `reference` names a mode, empty: the first of 16 bits; `checkpoints` has the folder of each mode with one
    of its own. A mode that fails becomes a row that says why. Ctrl-C and SIGTERM write a report of what is
    measured and are raised again, as KeyboardInterrupt and SystemExit. Raises PrecisionError, SettingError
    and SystemProblem before anything is measured.
    """
    console = console or Console()
    check(options)
    plan = Plan.make(settings, model_path, modes, options, reference=reference, checkpoints=checkpoints)
    tokenizer = settings.tokenizer_folder(model_path)
    text = EvaluationText.prepare(
        options.text, settings.calibration, tokenizer, options.num_windows, options.window_tokens
    )
    prompts = load_prompts(options)
    claim(out, plan)
    if app_factory is None:
        app_factory = import_module("service.api.app").create_app
    run = Comparison(plan, text, prompts, out, app_factory, command, measure_turn, first_look, console)
    try:
        run_to_end(run.all_turns())
    except (KeyboardInterrupt, SystemExit):
        console.print("stopped; the same command goes on from here")
        raise
    finally:
        report = build_report(plan, text, prompts, run.turns)
        if report.rows:
            write_report(report, out)
            print_report(report, out, console)
    return report


class Comparison:
    """The turns of one run, with one bar for all of them."""

    def __init__(
        self,
        plan: Plan,
        text: EvaluationText,
        prompts: Prompts,
        out: Path,
        app_factory: AppFactory,
        command: Sequence[str],
        measure_turn: Measure,
        first_look: Look,
        console: Console,
    ) -> None:
        self.begun = monotonic()
        self.plan, self.text, self.out = plan, text, out
        self.app_factory, self.command = app_factory, command
        self.measure_turn, self.first_look = measure_turn, first_look
        self.console = console
        self.prompts = greedy_prompts(plan, prompts)
        self.turns = Turns(plan, out)
        self.num_repeats = plan.options.repeats  # so far
        for repeat in range(plan.options.max_repeats):
            for turn, _ in plan.turns(repeat):
                path = out / plan.turn_file(turn)
                if path.is_file():
                    self.turns.add(read_back(path, Finished))
        if self.turns.done:
            console.print(f"{len(self.turns.done)} engines' figures were measured before, and are kept")
        self.kept_s = self.turns.seconds
        if (out / RATES_FILE).is_file():
            self.turns.rates = read_back(out / RATES_FILE, Rates)

    async def all_turns(self) -> None:
        options, turns = self.plan.options, self.turns
        lacking = [mode for mode in self.plan.modes if not turns.has_quality(mode) and not mode.server]
        with Pace(self.console, self.num_left + (turns.rates is None), len(lacking)) as pace:
            await self.settle_rates(pace)
            for repeat in range(options.max_repeats):
                if repeat >= options.repeats:
                    round_s = len(self.plan.everyone) * pace.turn_s
                    if not turns.unresolved() or self.spent_s + round_s > 60 * options.minutes:
                        break
                    self.num_repeats = repeat + 1
                    pace.remain(self.num_left)
                for turn, mode in self.left(repeat):
                    await self.one_turn(turn, mode, pace)

    @property
    def spent_s(self) -> float:
        """Of this run, with what precedes its turns, and of the turns of one that it goes on with."""
        return max(self.turns.seconds, self.kept_s + monotonic() - self.begun)

    @property
    def num_left(self) -> int:
        return sum(len(self.left(repeat)) for repeat in range(self.num_repeats))

    def left(self, repeat: int) -> list[tuple[Turn, Mode]]:
        """Turns of a repeat that are not measured yet, of modes that have not failed."""
        failed = self.turns.failures
        is_reference_gone = self.plan.reference.name in failed
        return [
            (turn, mode)
            for turn, mode in self.plan.turns(repeat)
            if (turn.mode, repeat) not in self.turns.done
            and turn.mode not in failed
            and not (is_reference_gone and mode == self.plan.null)
        ]

    async def settle_rates(self, pace: Pace) -> None:
        """By what the reference can answer, or, where it cannot start, the first mode that can."""
        first = [self.plan.reference, *(mode for mode in self.plan.modes if mode != self.plan.reference)]
        for mode in first:
            if self.turns.rates is not None:
                return
            if mode.server:
                continue
            job = self.job(Turn(order=-1, repeat=-1, mode=mode.name), mode, wants_quality=False)
            try:
                rates = await self.first_look(
                    job, pace.advancing(f"{mode.name}, a first look", wants_quality=False)
                )
            except HalftoneError as error:
                self.failed(mode, error, pace)
                continue
            write_whole(self.out / RATES_FILE, msgspec.json.encode(rates))
            self.turns.rates = rates
            pace.ended(pace.turn_s, 0.0)

    async def one_turn(self, turn: Turn, mode: Mode, pace: Pace) -> None:
        wants_quality = not (mode.server or mode == self.plan.null or self.turns.has_quality(mode))
        if self.turns.rates is None or mode.name in self.turns.failures:
            return
        said = f"{mode.name}, repeat {turn.repeat + 1}"
        try:
            finished = await self.measure_turn(
                self.job(turn, mode, wants_quality=wants_quality), pace.advancing(said, wants_quality)
            )
        except HalftoneError as error:
            self.failed(mode, error, pace)
            return
        write_whole(self.out / self.plan.turn_file(turn), msgspec.json.encode(finished))
        self.turns.add(finished)
        pace.ended(
            finished.seconds - finished.quality_seconds - finished.quantize_seconds, finished.quality_seconds
        )

    def job(self, turn: Turn, mode: Mode, *, wants_quality: bool) -> Job:
        return Job(
            plan=self.plan,
            turn=turn,
            mode=mode,
            phases=self.plan.phases(turn.repeat, self.turns.rates),
            text=self.text,
            prompts=self.prompts,
            wants_quality=wants_quality,
            out=self.out,
            app_factory=self.app_factory,
            command=self.command,
        )

    def failed(self, mode: Mode, error: HalftoneError, pace: Pace) -> None:
        self.turns.failures[mode.name] = failed_row(mode, error)
        pace.remain(self.num_left)
        self.console.print(f"[red]{mode.name}: failed:[/red] {error.message}", highlight=False)


def greedy_prompts(plan: Plan, prompts: Prompts) -> list[list[int]]:
    """Token ids of the first prompts, as a chat would ask them where the model is one: a bare question may be
    answered by the end of the text alone, which every precision agrees on."""
    settings = plan.settings
    codec = TextCodec.load(settings.tokenizer_folder(plan.model_path), settings.chat_template)

    def ids(prompt: Prompt) -> list[int]:
        if prompt.token_ids:
            return list(prompt.token_ids)
        if codec.template is None:
            return codec.encode(prompt.text)
        return codec.encode_chat([{"role": "user", "content": prompt.text}])

    return [ids(prompt) for prompt in prompts.items[:GREEDY_PROMPTS]]


def failed_row(mode: Mode, error: HalftoneError) -> Row:
    """Why a mode has no figures of speed: a fault, or a device that is too small for it."""
    if isinstance(error, ShortageError) and error.needs_bytes:
        needs, has = f"{error.needs_bytes / 1e9:.1f} GB", f"{error.has_bytes / 1e9:.1f} GB"
        return Row(
            mode=mode,
            status="does not fit",
            error=f"does not fit: needs {needs}, has {has}",
            fit=Fit(needs_bytes=error.needs_bytes, has_bytes=error.has_bytes),
        )
    return Row(mode=mode, status="failed", error=str(error))


def load_prompts(options: CompareOptions) -> Prompts:
    """Raises SettingError for a file that holds no prompts."""
    try:
        return Prompts.load(Path(options.prompts) if options.prompts else DEFAULT_PROMPTS)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"prompts `{options.prompts}` cannot be used: {error}",
            hint='write one object a line: {"prompt": "..."}',
        ) from None
