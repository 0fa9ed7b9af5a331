"""Finished turns -> rows with intervals, the words around them, and the Report.

job --Turns--> build_report() --Report--> export, page
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from loadtest.prompts import Prompts
from service.compare.environment import environment
from service.compare.figures import Interval
from service.compare.findings import SPEED, Ratio, crossover, front, knee, null_comparison
from service.compare.levels import Observed, measured_level, one_ratio
from service.compare.mode import Finished
from service.compare.plan import Phase, Plan, Rates
from service.compare.report import (
    FORMAT,
    Device,
    Loading,
    Memory,
    Mode,
    Model,
    Quality,
    Report,
    Row,
    Slo,
    Text,
    Verdict,
    Workload,
    purchase,
)
from service.compare.statistics import over_runs, resolves
from service.compare.verdict import Case, judge
from service.compare.windows import EvaluationText
from service.compare.words import first_line, place_of, supports


@dataclass
class Turns:
    """What a run has so far: turns by mode and repeat, modes that failed, and the rates."""

    plan: Plan
    out: Path
    done: dict[tuple[str, int], Finished] = field(default_factory=dict)
    failures: dict[str, Row] = field(default_factory=dict)
    rates: Rates | None = None
    _observed: dict[tuple[str, int], dict[str, Observed]] = field(default_factory=dict)

    def add(self, finished: Finished) -> None:
        self.done[finished.turn.mode, finished.turn.repeat] = finished

    def of(self, mode: Mode) -> dict[int, Finished]:
        """By repeat."""
        return {repeat: one for (name, repeat), one in sorted(self.done.items()) if name == mode.name}

    def has_quality(self, mode: Mode) -> bool:
        return any(finished.quality for finished in self.of(mode).values())

    @property
    def seconds(self) -> float:
        return sum(finished.seconds for finished in self.done.values())

    def observed(self, mode: Mode, phase_id: str) -> dict[int, Observed]:
        """One level of one mode, by repeat; each file of requests is read once."""
        found = {}
        for repeat, finished in self.of(mode).items():
            key = (mode.name, repeat)
            if key not in self._observed:
                self._observed[key] = {
                    id: Observed.read(self.out, run, self.plan.options.slo)
                    for id, run in finished.runs.items()
                }
            if phase_id in self._observed[key]:
                found[repeat] = self._observed[key][phase_id]
        return found

    def ratio(self, one: Mode, other: Mode, figure: str, phase_id: str) -> Interval | None:
        """Of any two modes, over the repeats that both have."""
        phase = next((phase for phase in self.phases if phase.id == phase_id), None)
        if phase is None:
            return None
        return one_ratio(phase, figure, self.observed(one, phase_id), self.observed(other, phase_id))

    @property
    def phases(self) -> list[Phase]:
        return self.plan.phases(0, self.rates) if self.rates else []

    def unresolved(self) -> list[str]:
        """Modes whose tokens/s are not known against the reference's to within half of 5 %."""
        plan = self.plan
        return [
            mode.name
            for mode in plan.everyone
            if mode != plan.reference
            and mode.name not in self.failures
            and not resolves(self.ratio(mode, plan.reference, SPEED, plan.throughput_level))
        ]


def build_report(plan: Plan, text: EvaluationText, prompts: Prompts, turns: Turns) -> Report:
    """Rows in the order asked, and what follows from all of them."""
    rows = [row for mode in plan.modes if (row := row_of(turns, mode))]
    base = next((row for row in rows if row.ok and row.name == plan.reference.name), None)
    tokens = request_tokens(base)
    by_name = {mode.name: mode for mode in plan.everyone}
    served = next((finished.served for finished in turns.done.values() if finished.served), None)
    model = (served and served.model) or Model(
        name=plan.settings.name, path=str(plan.model_path), architecture="", num_parameters=0
    )

    def ratio(one: Row, other: Row, figure: str, level_id: str) -> Interval | None:
        return turns.ratio(by_name[one.name], by_name[other.name], figure, level_id)

    on_front = front(rows, ratio, plan.throughput_level, judges_quality=not model.random_weights)
    rows = [
        msgspec.structs.replace(row, purchase=purchase(row, base, tokens), is_on_front=on_front.get(row.name))
        for row in rows
    ]
    null_row = row_of(turns, plan.null)
    null = null_comparison(null_row, plan.reference.name) if null_row and null_row.ok else None
    device = Device(
        kind=served.device if served else plan.settings.device,
        name=served.device_name if served else "",
        threads=plan.settings.threads,
    )
    workload = workload_of(plan, turns, prompts)
    lacking = [mode.name for mode in plan.everyone if is_lacking(turns, mode)]
    report = Report(
        format=FORMAT,
        first_line=first_line(model, device, workload, rows),
        supports=supports(plan, model, num_repeats(rows)),
        complete=not lacking and not turns.failures,
        not_measured=lacking,
        reference=plan.reference.name,
        model=model,
        device=device,
        workload=workload,
        text=text_of(text),
        rows=rows,
        null=null,
        schedule=[turn for repeat in range(num_repeats(rows)) for turn, _ in plan.turns(repeat)],
        environment=environment(served.torch_version if served else ""),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=turns.seconds,
    )
    is_reference_known = base is not None or any(
        row.name == plan.reference.name and row.status == "does not fit" for row in rows
    )
    if lacking or not is_reference_known:
        return report
    return msgspec.structs.replace(report, verdict=verdict_of(plan, report, turns, ratio))


def row_of(turns: Turns, mode: Mode) -> Row | None:
    """One mode over its repeats; None where nothing is measured yet."""
    if mode.name in turns.failures:
        row = turns.failures[mode.name]
        is_streamed = mode == turns.plan.reference and row.status == "does not fit"
        return msgspec.structs.replace(row, quality=streamed_quality(turns)) if is_streamed else row
    finished = turns.of(mode)
    if not finished:
        return None
    plan = turns.plan
    is_reference = mode == plan.reference
    levels = [
        measured_level(phase, mine, None if is_reference else turns.observed(plan.reference, phase.id))
        for phase in turns.phases
        if (mine := turns.observed(mode, phase.id))
    ]
    first = next(iter(finished.values()))
    return Row(
        mode=mode,
        status="ok",
        num_repeats=len(finished),
        levels=levels,
        knee=knee(levels),
        crossover=None if is_reference else crossover(levels, plan.reference.name),
        memory=highest_memory([one.memory for one in finished.values() if one.memory]),
        loading=loading_of(list(finished.values())) if first.served else None,
        quality=next((one.quality for one in finished.values() if one.quality), None),
        dtype=first.served.dtype if first.served else "",
        kv_dtype=first.served.kv_dtype if first.served else "",
        kernels=first.served.kernels if first.served else {},
        calibration=first.served.calibration if first.served else {},
        seconds=sum(one.seconds for one in finished.values()),
    )


def streamed_quality(turns: Turns) -> Quality | None:
    """The reference's, where it does not fit: other modes' engines streamed its layers over the same text."""
    known = (finished.quality for finished in turns.done.values() if finished.quality)
    beside = next((quality for quality in known if quality.reference_perplexity is not None), None)
    if beside is None or beside.reference_perplexity is None:
        return None
    return Quality(
        perplexity=beside.reference_perplexity,
        tokens=beside.tokens,
        kl_mean=0.0,
        kl_tokens=beside.kl_tokens,
        top1_agreement=1.0,
        reference_perplexity=beside.reference_perplexity,
    )


def is_lacking(turns: Turns, mode: Mode) -> bool:
    """Was the run stopped before this mode had all its repeats?"""
    if mode.name in turns.failures:
        return False
    if mode == turns.plan.null and turns.plan.reference.name in turns.failures:
        return False
    return len(turns.of(mode)) < turns.plan.options.repeats


def highest_memory(found: Sequence[Memory]) -> Memory | None:
    """Of the repeat that held most under load, with the highest peak of loading."""
    if not found:
        return None
    most = max(found, key=lambda memory: memory.peak_bytes)
    return msgspec.structs.replace(most, peak_load_bytes=max(memory.peak_load_bytes for memory in found))


def loading_of(finished: Sequence[Finished]) -> Loading:
    stages = {stage for one in finished for stage in one.stages}
    return Loading(
        seconds=over_runs([sum(one.stages.values()) for one in finished]),
        stages={
            stage: sum(one.stages.get(stage, 0.0) for one in finished) / len(finished)
            for stage in sorted(stages)
        },
        quantize_seconds=sum(one.quantize_seconds for one in finished),
    )


def workload_of(plan: Plan, turns: Turns, prompts: Prompts) -> Workload:
    options = plan.options
    limits = options.slo.limits_s if options.slo else {}
    shares = [level for level in options.levels if level.share]
    return Workload(
        prompts=f"{len(prompts.items)} texts of {prompts.source}",
        prompts_sha256=prompts.sha256,
        seed=options.seed,
        rate_rule=f"{', '.join(map(str, shares))} of the {turns.rates.capacity_per_s:.3g} requests/s that "
        f"{plan.reference.name} answered with the most streams, in an engine before"
        if shares and turns.rates
        else "as asked",
        output_tokens=options.output_tokens,
        kv_tokens=plan.settings.kv_tokens,
        num_repeats=options.repeats,
        max_repeats=options.max_repeats,
        slo=Slo(**{f"{name}_s": limit_s for name, limit_s in limits.items()}) if limits else None,
        throughput_level=plan.throughput_level,
        latency_level=plan.latency_level(turns.rates) if turns.rates else "",
        deterministic=plan.settings.deterministic,
    )


def text_of(text: EvaluationText) -> Text:
    return Text(
        name=text.text.name,
        sha256=text.text.sha256,
        python=text.text.python,
        calibration_name=text.calibration.name,
        calibration_sha256=text.calibration.sha256,
        num_windows=len(text.windows),
        window_tokens=len(text.windows[0]),
        protocol=text.protocol,
        tokenizer_sha256=text.tokenizer_sha256,
    )


def verdict_of(plan: Plan, report: Report, turns: Turns, ratio: Ratio) -> Verdict:
    return judge(
        Case(
            rows=report.rows,
            reference=report.reference,
            ratio=ratio,
            place=place_of(report),
            throughput_level=report.workload.throughput_level,
            latency_level=report.workload.latency_level,
            rate_levels=[phase.id for phase in turns.phases if not phase.concurrency],
            slo=report.workload.slo.said if report.workload.slo else "",
            max_perplexity_rise=plan.options.max_perplexity_rise,
            judges_quality=report.judges_quality,
            null=report.null,
        )
    )


def num_repeats(rows: Sequence[Row]) -> int:
    return max((row.num_repeats for row in rows), default=0)


def request_tokens(row: Row | None) -> float:
    """Prompt and answer together, mean over every request that was answered."""
    runs = [run for level in row.levels for run in level.runs] if row else []
    num_requests = sum(run.num_ok for run in runs)
    tokens = sum(run.prompt_tokens + run.output_tokens for run in runs)
    return tokens / num_requests if num_requests else 0.0
