"""Which turns a comparison takes, and what stays of them: order, failures, more repeats, resuming."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from service.compare.mode import Advance, Finished, Job
from service.compare.options import CompareOptions, parse_levels
from service.compare.plan import weights_stamp
from service.compare.report import Report, shipped_schema
from service.errors import HalftoneError, PrecisionError, SettingError, ShortageError, SystemProblem
from tests.compare.fake_load import Behaviour, FakeTurns, no_room

Compare = Callable[..., Report]


@pytest.fixture
def fake(compare: Compare, options: CompareOptions) -> Callable[..., Report]:
    """A comparison of made-up engines: `turns`, modes, and options that differ."""

    def run(turns: FakeTurns, modes: str = "bf16,int8", **changes: Any) -> Report:
        names = {"reference", "out", "checkpoints"}
        arguments = {name: changes.pop(name) for name in names & set(changes)}
        return compare(
            modes,
            measure_turn=turns.measure,
            first_look=turns.look,
            options=replace(options, **changes),
            **arguments,
        )

    return run


def test_modes_are_interleaved_in_an_order_of_each_repeats_own(fake: Compare, tmp_path: Path) -> None:
    turns = FakeTurns()
    report = fake(turns, "bf16,int8,nf4", repeats=4, max_repeats=4)
    assert turns.looked == ["bf16"]
    orders = [[name for name, at in turns.asked if at == repeat] for repeat in range(4)]
    assert all(sorted(order) == ["bf16", "bf16 again", "int8", "nf4"] for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert [repeat for _, repeat in turns.asked] == sorted(repeat for _, repeat in turns.asked)
    assert [(turn.mode, turn.repeat) for turn in report.schedule] == turns.asked
    assert sorted(turns.with_quality) == ["bf16", "int8", "nf4"]  # once each: weights do not change
    again = FakeTurns()
    fake(again, "bf16,int8,nf4", repeats=4, max_repeats=4, out=tmp_path / "another")
    assert again.asked == turns.asked


def test_every_mode_of_a_repeat_has_the_same_requests_and_each_repeat_its_own(fake: Compare) -> None:
    report = fake(FakeTurns(), "bf16,int8")
    assert report.null is not None
    rows = (*report.rows, report.null.row)
    for place in range(len(rows[0].levels)):
        seeds = {tuple(run.seed for run in row.levels[place].runs) for row in rows}
        assert len(seeds) == 1
    seeds = [run.seed for level in rows[0].levels for run in level.runs]
    assert len(set(seeds)) == len(seeds)


def test_rates_are_shares_of_what_the_reference_can(fake: Compare) -> None:
    report = fake(FakeTurns(), levels=parse_levels("1,2,30%,60%,90%"))
    assert [level.rate_per_s for level in report.rows[0].levels] == [0, 0, 3, 6, 9]
    assert report.workload.latency_level == "open-6"
    assert report.workload.throughput_level == "closed-2"


def test_a_slower_mode_is_found_and_the_reference_is_not_ahead_of_itself(fake: Compare) -> None:
    turns = FakeTurns(noise=0.01, int8=Behaviour(slowness=0.8, perplexity_ratio=1.02, kl=0.02))
    report = fake(turns, repeats=3, max_repeats=3)
    ratio = report.rows[1].ratio("output_tokens_per_s", "closed-2")
    assert ratio is not None
    assert ratio.estimate == pytest.approx(1.25, abs=0.05)
    assert ratio.excludes(1.0)
    assert report.rows[0].levels[0].ratios is None
    assert report.null is not None
    again = report.null.row.ratio("output_tokens_per_s", "closed-2")
    assert again is not None
    assert not again.excludes(1.0)
    assert report.verdict is not None
    assert report.verdict.deploy == "int8"
    assert report.rows[1].crossover is not None
    assert report.rows[1].crossover.kind == "always pays"
    assert [row.is_on_front for row in report.rows] == [True, True]  # bf16 is slower, and diverges less


@pytest.mark.parametrize(
    ("noise", "minutes", "repeats"),
    [(0.0, 60.0, 2), (0.05, 60.0, 4), (0.05, 0.0, 2)],
    ids=["resolved", "noisy", "no time"],
)
def test_repeats_are_added_where_five_percent_cannot_be_resolved(
    fake: Compare, noise: float, minutes: float, repeats: int
) -> None:
    report = fake(FakeTurns(noise=noise), repeats=2, max_repeats=4, minutes=minutes)
    assert {row.num_repeats for row in report.rows} == {repeats}


def test_a_failed_mode_is_a_row_that_says_why_and_is_tried_again(fake: Compare, tmp_path: Path) -> None:
    failing = FakeTurns(int8=Behaviour(fault=no_room(), fault_from=1))
    report = fake(failing, "bf16,int8,nf4", repeats=3, max_repeats=3)
    assert failing.asked.count(("int8", 1)) == 1
    assert ("int8", 2) not in failing.asked
    assert [row.status for row in report.rows] == ["ok", "failed", "ok"]
    assert "no kernel here" in report.rows[1].error
    assert not report.complete
    assert report.verdict is not None
    assert "no kernel here" in report.verdict.rejected["int8"]
    jsonschema.validate(json.loads((tmp_path / "report/report.json").read_bytes()), shipped_schema())

    again = FakeTurns()
    report = fake(again, "bf16,int8,nf4", repeats=3, max_repeats=3)
    assert again.looked == []
    assert again.asked == [("int8", 1), ("int8", 2)]
    assert report.complete
    assert {row.num_repeats for row in report.rows} == {3}


def test_without_its_reference_a_run_still_measures_the_others(fake: Compare) -> None:
    turns = FakeTurns(bf16=Behaviour(fault=HalftoneError("no room for bf16")))
    report = fake(turns)
    assert turns.looked == ["bf16", "int8"]
    assert [row.status for row in report.rows] == ["failed", "ok"]
    assert report.null is None
    assert report.rows[1].levels[0].ratios is None
    assert report.verdict is None


def test_a_reference_that_does_not_fit_has_quality_and_no_speed(fake: Compare, tmp_path: Path) -> None:
    """The user who needs a comparison most: others stream its layers, and are told apart without it."""
    shortage = ShortageError("no room", needs_bytes=16_100_000_000, has_bytes=8_000_000_000)
    turns = FakeTurns(
        bf16=Behaviour(fault=shortage),
        int8=Behaviour(perplexity_ratio=1.02, kl=0.02),
        nf4=Behaviour(perplexity_ratio=1.03, kl=0.03, slowness=0.5),
    )
    report = fake(turns, "bf16,int8,nf4")
    first = report.rows[0]
    assert first.status == "does not fit"
    assert first.error == "does not fit: needs 16.1 GB, has 8.0 GB"
    assert first.levels == []
    assert first.quality is not None
    assert first.quality.perplexity == pytest.approx(20)
    assert report.verdict is not None
    assert report.verdict.deploy == "nf4"
    assert report.verdict.rejected["bf16"] == first.error
    assert "needs 16.1 GB, has 8.0 GB" in (tmp_path / "report/report.html").read_text()


def test_a_checkpoint_of_its_own_is_served_with_the_models_tokenizer(
    fake: Compare, model_path: Path, tmp_path: Path
) -> None:
    started: dict[str, tuple[Path, str, str]] = {}

    class Noting(FakeTurns):
        async def measure(self, job: Job, advance: Advance) -> Finished:
            settings = job.plan.settings_of(job.mode)
            started[job.mode.name] = (job.plan.path_of(job.mode), settings.tokenizer, settings.kv_dtype)
            return await super().measure(job, advance)

    own = tmp_path / "own"
    own.mkdir()
    fake(Noting(), f"bf16,awq={own}", checkpoints={"awq": own})
    assert started["bf16"] == started["bf16 again"] == (model_path, "", "auto")
    assert started["awq"] == (own, str(model_path), "auto")


def test_where_nothing_starts_there_are_reasons_alone(fake: Compare) -> None:
    fault = Behaviour(fault=HalftoneError("no such layer"))
    report = fake(FakeTurns(bf16=fault, int8=fault))
    assert [row.status for row in report.rows] == ["failed", "failed"]
    assert all("no such layer" in row.error for row in report.rows)


def test_ctrl_c_keeps_what_is_measured_and_the_same_command_goes_on(fake: Compare, tmp_path: Path) -> None:
    stopped = FakeTurns(int8=Behaviour(fault=KeyboardInterrupt(), fault_from=1))
    with pytest.raises(KeyboardInterrupt):
        fake(stopped)
    partial = json.loads((tmp_path / "report/report.json").read_bytes())
    assert not partial["complete"]
    assert "int8" in partial["not_measured"]
    assert partial["verdict"] is None

    rest = FakeTurns()
    report = fake(rest)
    assert report.complete
    assert rest.looked == []
    kept = [one for one in stopped.asked if one != ("int8", 1)]
    assert sorted([*kept, *rest.asked]) == sorted(
        (name, repeat) for name in ("bf16", "int8", "bf16 again") for repeat in range(2)
    )


@pytest.mark.parametrize(("before_s", "repeats"), [(0.0, 3), (3600.0, 2)])
def test_what_precedes_the_turns_counts_too(
    fake: Compare, monkeypatch: pytest.MonkeyPatch, before_s: float, repeats: int
) -> None:
    """The front and the first look: a third repeat that would have fitted without them does not."""
    clock = iter([0.0])
    monkeypatch.setattr("service.compare.job.monotonic", lambda: next(clock, before_s))
    report = fake(FakeTurns(noise=0.3), repeats=2, max_repeats=3, minutes=60.0)
    assert {row.num_repeats for row in report.rows} == {repeats}


@pytest.mark.parametrize(("this_run_s", "repeats"), [(0.0, 3), (3592.0, 2)])
def test_turns_that_are_kept_count_beside_what_this_run_takes(
    fake: Compare, monkeypatch: pytest.MonkeyPatch, this_run_s: float, repeats: int
) -> None:
    """They once counted only where they took longer: at least three of 2 s, and a round takes 3 to 6."""
    told: dict[str, Any] = {"repeats": 2, "max_repeats": 3, "minutes": 60.0}
    with pytest.raises(KeyboardInterrupt):
        fake(FakeTurns(noise=0.3, int8=Behaviour(fault=KeyboardInterrupt(), fault_from=1)), **told)
    clock = iter([0.0])
    monkeypatch.setattr("service.compare.job.monotonic", lambda: next(clock, this_run_s))
    report = fake(FakeTurns(noise=0.3), **told)
    assert {row.num_repeats for row in report.rows} == {repeats}


def test_a_finished_run_takes_more_repeats(fake: Compare) -> None:
    fake(FakeTurns(), repeats=2, max_repeats=2)
    more = FakeTurns()
    report = fake(more, repeats=3, max_repeats=3)
    assert sorted(more.asked) == [("bf16", 2), ("bf16 again", 2), ("int8", 2)]
    assert {row.num_repeats for row in report.rows} == {3}


def test_a_folder_with_another_run_is_refused(fake: Compare, tmp_path: Path) -> None:
    fake(FakeTurns(), "bf16")
    with pytest.raises(SystemProblem, match="finished run"):
        fake(FakeTurns(), "bf16")
    with pytest.raises(SystemProblem, match="another run: its modes differ"):
        fake(FakeTurns(), "bf16,int8")
    with pytest.raises(SystemProblem, match="another run: its options differ"):
        fake(FakeTurns(), "bf16", seed=1)
    (tmp_path / "report/report.json").unlink()
    (tmp_path / "report/modes/1-bf16-1.json").write_text('{"row": {}}')
    with pytest.raises(SystemProblem, match="cannot be read back"):
        fake(FakeTurns(), "bf16")
    strange = tmp_path / "mine"
    strange.mkdir()
    (strange / "thesis.tex").write_text("precious")
    with pytest.raises(SystemProblem, match="not empty"):
        fake(FakeTurns(), "bf16", out=strange)
    assert [path.name for path in strange.iterdir()] == ["thesis.tex"]
    with pytest.raises(SystemProblem, match="is a file"):
        fake(FakeTurns(), "bf16", out=strange / "thesis.tex")


@pytest.mark.parametrize(
    ("modes", "reference", "match"),
    [
        ("int8,nf4", "", "no mode to compare against"),
        ("bf16,bf16", "", "twice"),
        ("bf16,q9", "", "q9"),
        ("bf16,int8", "int8", "no mode to compare against"),
        ("bf16,int8", "fp16", "none of the modes"),
    ],
)
def test_modes_are_checked_before_anything_starts(
    fake: Compare, modes: str, reference: str, match: str, tmp_path: Path
) -> None:
    with pytest.raises(PrecisionError, match=match):
        fake(FakeTurns(), modes, reference=reference)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "changes",
    [{"output_tokens": 1}, {"num_windows": 900}, {"agreement_tokens": 100_000}, {"max_repeats": 1}],
)
def test_amounts_are_checked_before_anything_starts(
    fake: Compare, changes: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(SettingError):
        fake(FakeTurns(), "bf16", **changes)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("option", ["prompts", "text"])
@pytest.mark.parametrize(("name", "reason"), [("absent.txt", "no such file"), ("", "is a directory")])
def test_files_are_read_before_anything_starts(
    fake: Compare, option: str, name: str, reason: str, tmp_path: Path
) -> None:
    path = str(tmp_path / name)
    with pytest.raises(SettingError, match=reason) as caught:
        fake(FakeTurns(), "bf16", **{option: path})
    assert f"`--{option} {path}`" in caught.value.message
    assert f"`--{option}`" in caught.value.hint
    assert not (tmp_path / "report").exists()


def test_weights_are_told_by_time_and_what_describes_them_by_its_bytes(tmp_path: Path) -> None:
    """A preset that was installed anew is the same; so a run goes on."""
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config.write_text("{}")
    weights.write_bytes(bytes(8))
    before = weights_stamp(tmp_path)
    os.utime(config, (1, 1))
    assert weights_stamp(tmp_path) == before
    os.utime(weights, (1, 1))
    assert weights_stamp(tmp_path)["model.safetensors"] != before["model.safetensors"]
    config.write_text("[]")
    assert weights_stamp(tmp_path)["config.json"] != before["config.json"]
