"""`halftone compare --diff A.json B.json`: what changed between two reports, and what is worse beyond noise.

cli --two paths--> diff_reports() --Differences--> forms/changes

The two runs shared no repeat, so nothing is paired. A change is log(B / A) of two means; its standard error
follows from the intervals in both reports. Three repeats know their own spread badly, so the spread of a
figure is pooled over the modes: one machine measured them all. Whether something is worse is asked of many
figures at once, so each is held against a limit that chance alone exceeds somewhere in one comparison of
twenty (Bonferroni).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from service.compare.figures import HIGHER_IS_BETTER, Interval
from service.compare.files import read_back
from service.compare.report import FORMAT, MAX_DISAGREEMENT, Report, Row
from service.compare.statistics import student_t
from service.compare.student import quantile
from service.errors import SettingError

FALSE_ALARMS = 0.05  # share of comparisons without any change in which chance may flag something
TOLERANCE = 0.02  # two runs on another day differ by more than repeats of one run do
MAX_KL_GROWTH = 0.1
LEAST_KL = 1e-3  # nats per token; below it rounding of kernels decides
MAX_BYTES_GROWTH = 0.001  # weights are counted; what grows is another format
Effect = Literal["worse", "better", "undecided"]


@dataclass(frozen=True)
class Change:
    """One figure of one mode in both reports."""

    mode: str
    figure: str  # field of Figures, or what else it is called in report.csv
    where: str  # level of load in words; empty: none
    before: float
    after: float
    interval: tuple[float, float] | None  # of after / before at 95 %; None: counted, not sampled
    effect: Effect

    @property
    def ratio(self) -> float:
        return self.after / self.before


@dataclass(frozen=True)
class Differences:
    before: Report
    after: Report
    circumstances: list[tuple[str, str, str]]  # (what, before, after), where they differ
    changes: list[Change]
    lost: list[str]  # modes that the first report has figures of and the second has not, with the reason
    left_out: list[str]  # what could not be compared, and why
    tolerance: float

    def having(self, effect: Effect) -> list[Change]:
        return [change for change in self.changes if change.effect == effect]

    @property
    def is_worse(self) -> bool:
        return bool(self.lost or self.having("worse"))


@dataclass(frozen=True)
class Sampled:
    """A change before it is judged. Logarithms."""

    mode: str
    figure: str
    where: str
    before: float
    after: float
    standard_error: float
    degrees: int

    @property
    def change(self) -> float:
        return math.log(self.after / self.before)


@dataclass
class Collected:
    """What both reports know, before it is judged."""

    sampled: list[Sampled] = field(default_factory=list)
    counted: list[Change] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def read_report(path: Path) -> Report:
    """Raises SystemProblem for what is no report of this version."""
    return read_back(path, Report, hint=f"name two report.json of format `{FORMAT}`: `--diff A.json B.json`")


def diff_reports(before: Report, after: Report, tolerance: float = TOLERANCE) -> Differences:
    """`tolerance`: share by which a figure may be worse without counting.

    Raises SettingError where the two have nothing to compare.
    """
    if (mine := identity(before)) != (theirs := identity(after)):
        raise SettingError(
            f"`--diff` was given reports of two models: {mine} and {theirs}",
            hint="compare runs of one model; other versions, devices and settings may differ",
        )
    pairs = [
        (row, other)
        for row in before.rows
        for other in after.rows
        if row.name == other.name and row.ok and other.ok
    ]
    found = Collected()
    compare_speed(before, after, pairs, found)
    for row, other in pairs:
        compare_bytes(row, other, tolerance, found)
    compare_quality(before, after, pairs, found)
    changes = [*judged(found.sampled, tolerance), *found.counted]
    lost = lost_modes(before, after)
    if not changes and not lost:
        raise SettingError(
            f"`--diff` found nothing to compare: {'; '.join(found.left_out) or 'no mode is in both reports'}",
            hint="run both with the same modes, prompts and levels of load",
        )
    return Differences(before, after, circumstances(before, after), changes, lost, found.left_out, tolerance)


def identity(report: Report) -> str:
    model = report.model
    return f"{model.name} ({model.architecture}, {model.num_parameters:,d} parameters)"


def circumstances(before: Report, after: Report) -> list[tuple[str, str, str]]:
    """Versions, device and settings that are not the same."""
    told = []
    for report in (before, after):
        work = report.workload
        told.append(
            {
                "device": report.device.name,
                "threads": str(report.device.threads or "one per core"),
                "started": report.started_at,
                **report.environment,
                "KV tokens": str(work.kv_tokens),
                "deterministic": str(work.deterministic),
                "SLO": work.slo.said if work.slo else "none",
            }
        )
    first, second = told
    names = dict.fromkeys([*first, *second])
    pairs = [(name, first.get(name, ""), second.get(name, "")) for name in names if name != "command"]
    return [(name, old, new) for name, old, new in pairs if old != new]


def lost_modes(before: Report, after: Report) -> list[str]:
    rows = {row.name: row for row in after.rows}
    lost = []
    for row in before.rows:
        other = rows.get(row.name)
        if row.ok and other is None:
            lost.append(f"{row.name}: not measured in the second report")
        elif row.ok and other is not None and not other.ok:
            lost.append(f"{row.name}: {other.status} in the second report: {' '.join(other.error.split())}")
    return lost


def compare_speed(before: Report, after: Report, pairs: Sequence[tuple[Row, Row]], found: Collected) -> None:
    """Tokens/s at every shared number of streams; latencies at the shared level that tables show."""
    for what in ("prompts_sha256", "output_tokens", "seed"):
        old, new = getattr(before.workload, what), getattr(after.workload, what)
        if old != new:
            found.left_out.append(
                f"speed: `{what}` of the workload is {old} in the first and {new} in the second"
            )
            return
    shown = [before.workload.latency_level, before.workload.throughput_level]
    shared = [id for id in shown if all(row.level(id) and other.level(id) for row, other in pairs)]
    if pairs and shared[:1] != shown[:1]:
        found.left_out.append(
            f"latencies at `{shown[0]}`, which the second report has not: name rates, as in `--levels 1,2/s`"
        )
    gone = {
        level.label
        for row, other in pairs
        for level in row.levels
        if level.is_closed and not other.level(level.id)
    }
    found.left_out += [f"tokens/s with {label}, which the second report has not" for label in sorted(gone)]
    has_one_slo = before.workload.slo == after.workload.slo
    if not has_one_slo:
        found.left_out.append("goodput: the SLOs differ")
    for row, other in pairs:
        for figure, level in asked_of(row, shared, has_one_slo=has_one_slo):
            add_sampled(found, row, figure, level, row.figure(figure, level), other.figure(figure, level))
        if row.loading and other.loading:
            add_sampled(found, row, "load_s", "", row.loading.seconds, other.loading.seconds)


def asked_of(row: Row, shared: Sequence[str], *, has_one_slo: bool) -> Iterator[tuple[str, str]]:
    for level in row.levels:
        if level.is_closed:
            yield "output_tokens_per_s", level.id
    if shared:
        yield from (("ttft_p95_s", shared[0]), ("itl_p95_s", shared[0]))
        if has_one_slo:
            yield "goodput_per_s", shared[0]
        yield "joules_per_output_token", shared[-1]


def add_sampled(
    found: Collected, row: Row, figure: str, level: str, before: Interval | None, after: Interval | None
) -> None:
    """Adds what both know with an interval; says what only one repeat is known of."""
    if before is None or after is None or not (before.estimate > 0 and after.estimate > 0):
        return
    errors = [relative_error(before), relative_error(after)]
    known = [error for error in errors if error is not None]
    if len(known) < 2:
        said = f"{row.name}: one repeat has no noise to hold a change against"
        found.left_out += [said] if said not in found.left_out else []
        return
    where = next((one.label for one in row.levels if one.id == level), "")
    degrees = before.n + after.n - 2
    error = math.hypot(*known)
    found.sampled.append(Sampled(row.name, figure, where, before.estimate, after.estimate, error, degrees))


def relative_error(interval: Interval) -> float | None:
    """Standard error of the logarithm, from an interval at 95 % by Student's t."""
    if interval.half_width is None:
        return None
    return interval.half_width / student_t(interval.n - 1)


def judged(sampled: Sequence[Sampled], tolerance: float) -> list[Change]:
    """Each change against what chance does somewhere among so many."""
    found = []
    for one in sampled:
        alike = [other for other in sampled if (other.figure, other.where) == (one.figure, one.where)]
        pooled = math.sqrt(sum(other.standard_error**2 for other in alike) / len(alike))
        # a mode that is less steady than the others keeps its own spread
        error, degrees = max(pooled, one.standard_error), sum(other.degrees for other in alike)
        reach = student_t(degrees) * error
        limit = quantile(FALSE_ALARMS / 2 / len(sampled), degrees) * error
        effect: Effect = "undecided"
        if abs(one.change) > max(limit, math.log1p(tolerance)):
            effect = "better" if (one.change > 0) is (one.figure in HIGHER_IS_BETTER) else "worse"
        ends = (math.exp(one.change - reach), math.exp(one.change + reach))
        found.append(Change(one.mode, one.figure, one.where, one.before, one.after, ends, effect))
    return found


def compare_bytes(row: Row, other: Row, tolerance: float, found: Collected) -> None:
    if not (row.memory and other.memory):
        return
    for name, allowed in (("weight_bytes", MAX_BYTES_GROWTH), ("peak_bytes", tolerance)):
        old, new = getattr(row.memory, name), getattr(other.memory, name)
        found.counted.append(counted(row.name, name, old, new, allowed))


def counted(mode: str, figure: str, before: float, after: float, allowed: float) -> Change:
    """Of what has no noise of its own: less is better."""
    growth = after / before - 1
    effect: Effect = "worse" if growth > allowed else "better" if growth < -allowed else "undecided"
    return Change(mode, figure, "", before, after, None, effect)


def compare_quality(
    before: Report, after: Report, pairs: Sequence[tuple[Row, Row]], found: Collected
) -> None:
    """Over the same tokens: the same weights compute the same up to rounding."""
    if not (before.judges_quality and after.judges_quality):
        found.left_out.append("quality: the weights are random")
        return
    for what in ("sha256", "protocol", "calibration_sha256", "tokenizer_sha256"):
        if getattr(before.text, what) != getattr(after.text, what):
            found.left_out.append(f"quality: the `{what}` of the text differs")
            return
    for row, other in pairs:
        if row.quality and other.quality:
            old, new = row.quality.perplexity, other.quality.perplexity
            found.counted.append(counted(row.name, "perplexity", old, new, MAX_DISAGREEMENT))
            old, new = row.quality.kl_mean, other.quality.kl_mean
            if before.reference == after.reference and min(old, new) > LEAST_KL:
                found.counted.append(counted(row.name, "kl", old, new, MAX_KL_GROWTH))
