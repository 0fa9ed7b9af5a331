"""The whole job over the real front and a fake engine: rows, files, failures, resuming."""

import asyncio
import contextlib
import csv
import io
import json
import signal
import socket
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import jsonschema
import pytest

from service.__main__ import leave
from service.compare import mode
from service.compare.figures import Level
from service.compare.loads import run_load
from service.compare.mode import Advance, Job, Measured, measure
from service.compare.plan import CompareOptions, Phase
from service.compare.report import Report, shipped_schema
from service.errors import HalftoneError, PrecisionError, SettingError, SystemProblem
from service.front import host
from service.front.host import Host, bind

Compare = Callable[..., Report]


class Counting:
    """`measure`, with the modes it was asked for, and faults where a test wants them."""

    def __init__(self, **faults: BaseException) -> None:
        self.asked: list[str] = []
        self.rates: list[float] = []
        self.faults = faults

    async def __call__(self, job: Job, advance: Advance) -> Measured:
        self.asked.append(job.precision)
        self.rates.append(job.rate_per_s)
        if job.precision in self.faults:
            raise self.faults[job.precision]
        return await measure(job, advance)


def test_two_modes_end_to_end(compare: Compare, tmp_path: Path) -> None:
    report = compare(["bf16", "int8"])
    out = tmp_path / "report"
    assert [row.name for row in report.rows] == ["bf16", "int8"]
    assert report.complete
    assert report.reference == "bf16"
    for row in report.rows:
        assert row.ok
        assert [level.id for level in row.levels] == ["closed-1", "closed-2", "open"]
        assert all(level.num_errors == level.num_short == 0 for level in row.levels)
        assert row.levels[1].runs[0].num_ok == 4
        speed = row.figure("output_tokens_per_s", report.workload.throughput_level)
        assert speed is not None
        assert speed.estimate == row.levels[1].runs[0].output_tokens_per_s > 0
        assert row.quality is not None
        assert row.quality.perplexity == pytest.approx(20, abs=1e-3)
        assert row.quality.kl_mean == pytest.approx(0.0123)
        assert row.quality.agreement.tokens == 128
        assert row.quality.agreement.agrees
        assert row.memory is not None
        assert row.memory.kv_tokens == 1024
        assert row.memory.peak_bytes - row.memory.peak_without_kv_bytes == row.memory.kv_bytes > 0
    written = json.loads((out / "report.json").read_bytes())
    jsonschema.validate(written, shipped_schema())
    raw = json.loads((out / written["rows"][1]["levels"][2]["runs"][0]["raw"]).read_bytes())
    assert raw["workload"]["model"] == "tiny-model"
    assert (out / "report.html").stat().st_size > 10_000
    lines = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert [line["mode"] for line in lines] == ["bf16", "int8"]
    assert float(lines[0]["perplexity"]) == pytest.approx(20, abs=1e-3)
    terminal = (tmp_path / "terminal.txt").read_text()
    assert "tiny-model" in terminal
    assert "int8" in terminal


def test_every_row_gets_the_same_requests_at_the_same_times(compare: Compare, tmp_path: Path) -> None:
    """Also where nobody names a rate: the first mode settles it, and the others take it over."""
    report = compare(["bf16", "nf4"], options=replace(base_options(tmp_path), rate_per_s=0.0))
    folder = tmp_path / "report"
    first, second = (
        [json.loads((folder / level.runs[0].raw).read_bytes()) for level in row.levels] for row in report.rows
    )
    arrivals, others = (result[2]["levels"][0]["arrivals"] for result in (first, second))
    assert arrivals == others
    assert arrivals["rate_per_s"] == report.rows[0].levels[2].rate_per_s > 0
    for one, other in zip(first, second, strict=True):
        assert one["workload"] == other["workload"]
        assert [r["prompt_tokens"] for r in by_index(one)] == [r["prompt_tokens"] for r in by_index(other)]
    due = [[r["scheduled_s"] for r in by_index(result[2])] for result in (first, second)]
    assert due[0] == pytest.approx(due[1])
    assert len({result["workload"]["seed"] for result in first}) == 3  # no phase repeats another's prompts


def base_options(tmp_path: Path) -> CompareOptions:
    return CompareOptions(
        concurrencies=(1, 2),
        requests_per_stream=2,
        num_open_requests=3,
        output_tokens=4,
        window_tokens=33,
        agreement_tokens=128,
        text=str(tmp_path / "text.txt"),
    )


def by_index(result: dict[str, list[dict[str, float]]]) -> list[dict[str, float]]:
    return sorted(result["levels"][0]["runs"][0]["requests"], key=lambda record: record["index"])


def test_a_failed_mode_is_a_row_that_says_why_and_is_tried_again(compare: Compare, tmp_path: Path) -> None:
    failing = Counting(int8=HalftoneError("`int8` has no kernel here", hint="use nf4"))
    report = compare(["bf16", "int8", "nf4"], measure_mode=failing)
    assert failing.asked == ["bf16", "int8", "nf4"]
    assert [row.status for row in report.rows] == ["ok", "failed", "ok"]
    assert "no kernel here" in report.rows[1].error
    assert not report.complete
    jsonschema.validate(json.loads((tmp_path / "report/report.json").read_bytes()), shipped_schema())
    for name in ("report.html", "report.md", "report.csv"):
        assert "no kernel here" in (tmp_path / "report" / name).read_text()

    again = Counting()
    report = compare(["bf16", "int8", "nf4"], measure_mode=again)
    assert again.asked == ["int8"]
    assert report.complete
    assert [row.status for row in report.rows] == ["ok", "ok", "ok"]


def test_an_engine_that_cannot_load_is_a_row(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FAKE_FATAL", "invalid_precision:no such layer")
    report = compare(["bf16", "int8"])
    assert [row.status for row in report.rows] == ["failed", "failed"]
    assert "no such layer" in report.rows[0].error
    assert "no such layer" in (tmp_path / "report/report.html").read_text()


def test_a_checkpoint_is_made_before_the_measured_engine_starts(
    compare: Compare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first start of awq once reported quantizing as its seconds to load and its peak."""
    monkeypatch.setenv("FAKE_QUANTIZE", "1")
    monkeypatch.setenv("FAKE_ONCE", str(tmp_path / "made"))
    starts: list[str] = []

    class CountedHost(Host):
        async def __aenter__(self) -> Self:
            starts.append(self.settings.precision)
            return await super().__aenter__()

    monkeypatch.setattr(mode, "Host", CountedHost)
    report = compare(["bf16", "awq", "awq:bits=3"])
    assert starts == ["bf16", "awq", "awq", "awq:bits=3"]
    assert [row.loading and row.loading.quantize_seconds for row in report.rows] == [0.0, 1.75, 0.0]
    for row in report.rows:
        assert row.loading is not None
        assert row.loading.stages == {"import": 0.1, "load": 0.5}
        assert row.memory is not None
        assert row.memory.peak_load_bytes == 300_000_000
    assert "awq: its checkpoint was made in 1.75 s" in (tmp_path / "report/report.md").read_text()
    assert "The checkpoint of awq was made in 1.75 s" in (tmp_path / "report/report.html").read_text()
    assert ",1.75," in (tmp_path / "report/report.csv").read_text()


def test_an_engine_that_was_started_again_is_no_row(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speed before and quality after would come from two processes."""
    hosts: list[Host] = []

    class WatchedHost(Host):
        async def __aenter__(self) -> Self:
            hosts.append(self)
            return await super().__aenter__()

    async def load_then_kill(url: str, model: str, phase: Phase, *rest: object) -> Level:
        load = await run_load(url, model, phase, *rest)  # type: ignore[arg-type]
        if phase.id == "open" and len(hosts) == 1:
            process = hosts[0].supervisor.process
            assert process is not None
            process.kill()
            await hosts[0].client.wait_for("down")
            await hosts[0].ready()
        return load

    monkeypatch.setattr(mode, "Host", WatchedHost)
    monkeypatch.setattr(mode, "run_load", load_then_kill)
    report = compare(["bf16", "int8"])
    assert [row.status for row in report.rows] == ["failed", "ok"]
    assert "died while it was measured" in report.rows[0].error


def test_metrics_are_where_the_settings_say_and_the_api_is_not(
    compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus, in another container, found no port to scrape."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    bound: list[tuple[str, int]] = []
    scraped: list[str] = []

    def noted_bind(host: str, port: int, setting: str) -> contextlib.AbstractContextManager[socket.socket]:
        bound.append((host, port))
        return bind(host, port, setting)

    def scrape() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as response:
            return str(response.read().decode())

    async def scraped_load(url: str, *rest: Any) -> Level:
        assert not url.endswith(f":{metrics_port}")
        scraped.append(await asyncio.to_thread(scrape))
        return await run_load(url, *rest)

    monkeypatch.setattr(host, "bind", noted_bind)
    monkeypatch.setattr(mode, "run_load", scraped_load)
    assert compare(["bf16", "int8"], {"host": "0.0.0.0", "metrics_port": metrics_port}).complete
    assert bound == 2 * [("127.0.0.1", 0), ("0.0.0.0", metrics_port)]
    assert 'precision="bf16"' in scraped[0]
    assert 'precision="int8"' in scraped[-1]


def test_ctrl_c_keeps_what_is_measured_and_the_same_command_goes_on(compare: Compare, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(["bf16", "int8"], measure_mode=Counting(int8=KeyboardInterrupt()))
    partial = json.loads((tmp_path / "report/report.json").read_bytes())
    assert [row["mode"]["name"] for row in partial["rows"]] == ["bf16"]
    assert not partial["complete"]

    rest = Counting()
    report = compare(["bf16", "int8"], measure_mode=rest)
    assert rest.asked == ["int8"]
    assert report.complete
    assert report.rows[0].seconds == partial["rows"][0]["seconds"]  # not measured anew


class Interrupted:
    """`measure` that signals this process when `int8` has come to a stage; remembers what it had started."""

    def __init__(self, number: signal.Signals, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.stage, self.setenv = number, stage, monkeypatch.setenv
        self.started: list[asyncio.subprocess.Process] = []
        self.spawn, self.run_load = asyncio.create_subprocess_exec, mode.run_load
        monkeypatch.setattr(asyncio, "create_subprocess_exec", self.remembered)
        monkeypatch.setattr(mode, "run_load", self.watched)

    async def remembered(self, *arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        self.started.append(await self.spawn(*arguments, **options))
        return self.started[-1]

    async def watched(self, *arguments: Any) -> Level:
        before = len(self.started)
        load = asyncio.ensure_future(self.run_load(*arguments))
        try:
            if self.is_due and self.stage == "traffic":
                while len(self.started) == before:
                    await asyncio.sleep(0)
                signal.raise_signal(self.number)
            return await load
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)

    async def __call__(self, job: Job, advance: Advance) -> Measured:
        self.is_due = job.precision == "int8"
        if self.is_due and self.stage == "load":
            self.setenv("FAKE_HANG_AT_LOAD", "1")

        def noticed(stage: str, share: float) -> None:
            advance(stage, share)
            if self.is_due and stage == self.stage != "traffic":
                signal.raise_signal(self.number)

        return await measure(job, noticed)


@pytest.mark.parametrize(
    ("number", "raised", "stage"),
    [
        (signal.SIGTERM, SystemExit, "load"),
        (signal.SIGTERM, SystemExit, "traffic"),
        (signal.SIGTERM, SystemExit, "quality"),
        (signal.SIGINT, KeyboardInterrupt, "traffic"),
    ],
)
def test_a_signal_leaves_a_report_and_no_process(
    compare: Compare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    raised: type[BaseException],
    stage: str,
) -> None:
    """SIGTERM once left the event loop where it stood: half a report, and tasks that nobody awaited."""
    interrupted = Interrupted(number, stage, monkeypatch)
    before = signal.signal(signal.SIGTERM, leave)  # as __main__ does
    # a shell's background jobs ignore Ctrl-C, and the tests may be one
    before_interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(raised) as error:
            compare(["bf16", "int8", "nf4"], measure_mode=interrupted)
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)
    assert not isinstance(error.value, SystemExit) or error.value.code == 143
    assert all(process.returncode is not None for process in interrupted.started)
    partial = json.loads((tmp_path / "report/report.json").read_bytes())
    assert [row["mode"]["name"] for row in partial["rows"]] == ["bf16"]
    assert partial["not_measured"] == ["int8", "nf4"]
    assert not partial["complete"]
    jsonschema.validate(partial, shipped_schema())
    for name in ("report/report.md", "report/report.html", "terminal.txt"):
        assert "Stopped before int8, nf4 were measured in full" in (tmp_path / name).read_text()


def test_a_folder_with_another_run_is_refused(
    compare: Compare, options: CompareOptions, tmp_path: Path
) -> None:
    compare(["bf16"])
    with pytest.raises(SystemProblem, match="finished run"):
        compare(["bf16"])
    with pytest.raises(SystemProblem, match="another run: its precisions differ"):
        compare(["bf16", "int8"])
    with pytest.raises(SystemProblem, match="another run: its options differ"):
        compare(["bf16"], options=replace(options, seed=1))
    (tmp_path / "report/report.json").unlink()
    (tmp_path / "report/modes/1-bf16.json").write_text('{"row": {}}')
    with pytest.raises(SystemProblem, match="cannot be read back"):
        compare(["bf16"])
    strange = tmp_path / "mine"
    strange.mkdir()
    (strange / "thesis.tex").write_text("precious")
    with pytest.raises(SystemProblem, match="not empty"):
        compare(["bf16"], out=strange)
    assert [path.name for path in strange.iterdir()] == ["thesis.tex"]
    with pytest.raises(SystemProblem, match="is a file"):
        compare(["bf16"], out=strange / "thesis.tex")


@pytest.mark.parametrize(
    ("precisions", "match"),
    [(["int8", "nf4"], "no mode to compare against"), (["bf16", "bf16"], "twice"), (["bf16", "q9"], "q9")],
)
def test_modes_are_checked_before_anything_starts(
    compare: Compare, precisions: list[str], match: str, tmp_path: Path
) -> None:
    with pytest.raises(PrecisionError, match=match):
        compare(precisions)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "changes",
    [{"concurrencies": ()}, {"output_tokens": 1}, {"num_windows": 900}, {"agreement_tokens": 100_000}],
)
def test_amounts_are_checked_before_anything_starts(
    compare: Compare, options: CompareOptions, changes: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(SettingError):
        compare(["bf16"], options=replace(options, **changes))  # type: ignore[arg-type]
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("option", ["prompts", "text"])
@pytest.mark.parametrize(("name", "reason"), [("absent.txt", "no such file"), ("", "is a directory")])
def test_files_are_read_before_anything_starts(
    compare: Compare, options: CompareOptions, option: str, name: str, reason: str, tmp_path: Path
) -> None:
    path = str(tmp_path / name)
    with pytest.raises(SettingError, match=reason) as caught:
        compare(["bf16"], options=replace(options, **{option: path}))
    assert f"`--{option} {path}`" in caught.value.message
    assert f"`--{option}`" in caught.value.hint
    assert not (tmp_path / "report").exists()
