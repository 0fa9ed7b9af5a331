"""Two reports -> what is worse: planted changes are found, noise is not."""

import io
import math
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import msgspec
import pytest
from rich.console import Console

from service.cli.diff import diff
from service.compare.diff import FALSE_ALARMS, Change, Sampled, diff_reports, judged, read_report
from service.compare.figures import Figures, Interval
from service.compare.report import Report, Row
from service.errors import HalftoneError, SettingError, SystemProblem
from tests.compare.made_up import MODES, failed, made_up, too_large

replace = msgspec.structs.replace
Factor = Callable[[str, str, str], float]  # of mode, level and figure


def times(report: Report, factor: Factor) -> Report:
    """Every figure of speed times what `factor` says."""

    def scaled(found: Interval | None, by: float) -> Interval | None:
        if found is None or found.low is None or found.high is None:
            return found
        return replace(found, estimate=found.estimate * by, low=found.low * by, high=found.high * by)

    def changed(row: Row) -> Row:
        levels = []
        for level in row.levels:
            new = {
                name: scaled(getattr(level.figures, name), factor(row.name, level.id, name))
                for name in Figures.__struct_fields__
            }
            levels.append(replace(level, figures=Figures(**new)))
        return replace(row, levels=levels)

    return replace(report, rows=[changed(row) for row in report.rows])


def one_mode(name: str, by: float) -> Factor:
    return lambda mode, level, figure: by if mode == name and figure == "output_tokens_per_s" else 1.0


def named(changes: list[Change]) -> set[tuple[str, str]]:
    return {(change.mode, change.figure) for change in changes}


def test_a_report_against_itself_has_no_change() -> None:
    found = diff_reports(made_up(), made_up())
    assert len(found.changes) > 5 * 8
    assert {change.effect for change in found.changes} == {"undecided"}
    assert all(change.ratio == 1 for change in found.changes)
    assert not found.is_worse
    assert found.circumstances == []
    assert found.left_out == []


@pytest.mark.parametrize(("by", "effect"), [(0.95, "worse"), (1.05, "better"), (0.985, "undecided")])
def test_a_planted_change_of_five_percent_is_found(by: float, effect: str) -> None:
    found = diff_reports(made_up(), times(made_up(), one_mode("nf4", by)))
    told = [
        change for change in found.changes if (change.mode, change.figure) == ("nf4", "output_tokens_per_s")
    ]
    assert {change.effect for change in told} == {effect}
    assert {change.effect for change in found.changes if change not in told} == {"undecided"}
    assert found.is_worse is (effect == "worse")


def test_more_latency_is_worse() -> None:
    found = diff_reports(made_up(), times(made_up(), lambda *at: 1.1 if "ttft" in at[2] else 1.0))
    assert named(found.having("worse")) == {(made.name, "ttft_p95_s") for made in MODES}
    assert found.having("better") == []


def test_chance_flags_one_comparison_of_twenty_at_most() -> None:
    """Three repeats of 1 % noise on both sides, their spread estimated from them: 300 times 50 figures."""
    generator = random.Random(0)

    def repeats() -> list[float]:
        return [generator.gauss(100, 1) for _ in range(3)]

    def drawn(mode: int, figure: int) -> Sampled:
        old, new = repeats(), repeats()
        error = math.hypot(*(stdev(values) / mean(values) / math.sqrt(3) for values in (old, new)))
        return Sampled(str(mode), str(figure), "", mean(old), mean(new), error, 4)

    flagged = 0
    for _ in range(300):
        sampled = [drawn(mode, figure) for mode in range(5) for figure in range(10)]
        flagged += any(change.effect != "undecided" for change in judged(sampled, tolerance=0.0))
    assert flagged <= 300 * FALSE_ALARMS


def test_a_mode_that_is_lost_fails() -> None:
    report = made_up()
    gone = replace(
        report, rows=[*report.rows[:2], failed("nf4", "no kernel"), *report.rows[4:]], complete=False
    )
    found = diff_reports(report, gone)
    assert found.lost == [
        "nf4: failed in the second report: no kernel",
        "awq: not measured in the second report",
    ]
    assert found.is_worse
    assert diff_reports(gone, report).lost == []


def test_bytes_and_quality_are_counted() -> None:
    report = made_up()
    rows = list(report.rows)
    memory, quality = rows[2].memory, rows[2].quality
    assert memory is not None
    assert quality is not None
    rows[2] = replace(
        rows[2],
        memory=replace(
            memory, weight_bytes=int(memory.weight_bytes * 1.01), peak_bytes=int(memory.peak_bytes * 0.9)
        ),
        quality=replace(quality, perplexity=quality.perplexity * 1.003, kl_mean=quality.kl_mean * 1.2),
    )
    found = diff_reports(report, replace(report, rows=rows))
    assert named(found.having("worse")) == {("nf4", "weight_bytes"), ("nf4", "perplexity"), ("nf4", "kl")}
    assert named(found.having("better")) == {("nf4", "peak_bytes")}


def test_what_differs_in_circumstances_is_told() -> None:
    report = made_up()
    other = replace(
        report,
        device=replace(report.device, name="NVIDIA H200"),
        environment={**report.environment, "torch": "2.14.0", "command": "halftone compare x"},
    )
    assert diff_reports(report, other).circumstances == [
        ("device", "NVIDIA H100 80GB HBM3", "NVIDIA H200"),
        ("torch", "2.13.0", "2.14.0"),
    ]


def test_other_traffic_is_not_compared() -> None:
    report = made_up()
    other = replace(report, workload=replace(report.workload, output_tokens=64))
    found = diff_reports(report, other)
    assert {change.figure for change in found.changes} == {"weight_bytes", "peak_bytes", "perplexity", "kl"}
    assert found.left_out == [
        "speed: `output_tokens` of the workload is 128 in the first and 64 in the second"
    ]


def test_other_rates_compare_latencies_with_every_stream_busy() -> None:
    report = made_up()
    rows = [
        replace(
            row,
            levels=[level if level.is_closed else replace(level, id=f"{level.id}.1") for level in row.levels],
        )
        for row in report.rows
    ]
    found = diff_reports(report, replace(report, rows=rows))
    assert {change.where for change in found.changes if change.figure == "ttft_p95_s"} == {"64 streams"}
    assert "latencies at `open-8`" in found.left_out[0]


def test_streams_that_one_run_lacks_are_named() -> None:
    report = made_up()
    rows = [
        replace(row, levels=[level for level in row.levels if level.concurrency != 4]) for row in report.rows
    ]
    found = diff_reports(report, replace(report, rows=rows))
    assert found.left_out == ["tokens/s with 4 streams, which the second report has not"]
    assert "4 streams" not in {change.where for change in found.changes}


def test_another_text_is_not_compared() -> None:
    report = made_up()
    other = replace(report, text=replace(report.text, sha256="9" * 64))
    assert "perplexity" not in {change.figure for change in diff_reports(report, other).changes}


def test_one_repeat_has_no_noise() -> None:
    once = made_up(repeats=1, null=None)
    found = diff_reports(once, times(once, one_mode("nf4", 0.5)))
    assert "nf4: one repeat has no noise to hold a change against" in found.left_out
    assert {change.figure for change in found.changes} == {"weight_bytes", "peak_bytes", "perplexity", "kl"}


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    report = made_up()
    with pytest.raises(SettingError, match=r"two models: llama-8b .* and other"):
        diff_reports(report, replace(report, model=replace(report.model, name="other")))
    nothing = replace(report, rows=[too_large("fp32")])
    with pytest.raises(SettingError, match="nothing to compare"):
        diff_reports(nothing, nothing)
    path = tmp_path / "report.json"
    path.write_text('{"format": "halftone-report/1"}')
    with pytest.raises(SystemProblem, match="cannot be read back") as error:
        read_report(path)
    assert "halftone-report/2" in error.value.hint


def test_the_command_prints_what_is_worse_and_fails(tmp_path: Path) -> None:
    report = made_up()
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, one in zip(paths, (report, times(report, one_mode("nf4", 0.9))), strict=True):
        path.write_bytes(msgspec.json.encode(one))
    console = Console(file=io.StringIO(), width=120, record=True)
    with pytest.raises(HalftoneError, match="4 figures worse beyond noise") as error:
        diff(*paths, 0.02, console)
    assert error.value.exit_code == 1
    text = console.export_text()
    assert "Worse beyond noise: nf4, tokens/s, 64 streams: 1,344 → 1,210, −10 % ✗ (−11 to −8.8)" in text
    assert "~ +0.0 %" in text
    console = Console(file=io.StringIO(), width=120)
    diff(paths[0], paths[0], 0.02, console)
