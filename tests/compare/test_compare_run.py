"""Turns over the real front and a fake engine: figures, engines that quantize or die, metrics, signals."""

import asyncio
import contextlib
import csv
import gc
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
from service.compare.mode import Advance, Finished, Job, measure
from service.compare.options import CompareOptions, parse_levels
from service.compare.report import Report, shipped_schema
from service.front import host
from service.front.host import Host, bind
from tests.compare.fake_load import fake_run_load

Compare = Callable[..., Report]
SEED = 14  # int8 comes first, and bf16 second, which has quality too


@pytest.fixture
def no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start and answer evaluations; nobody drives them."""
    monkeypatch.setattr(mode, "run_load", fake_run_load)


def once(options: CompareOptions) -> CompareOptions:
    return replace(options, repeats=1, max_repeats=1)


def test_two_modes_end_to_end(compare: Compare, options: CompareOptions, tmp_path: Path) -> None:
    """With the load generator: one engine of each, and the reference a second time."""
    report = compare("bf16,int8", options=replace(once(options), levels=parse_levels("2,50/s")))
    out = tmp_path / "report"
    assert report.null is not None
    assert report.complete
    assert report.reference == "bf16"
    assert [row.name for row in report.rows] == ["bf16", "int8"]
    for row in (*report.rows, report.null.row):
        assert row.ok
        assert row.num_repeats == 1
        assert [level.id for level in row.levels] == ["closed-2", "open-50"]
        assert all(level.num_errors == level.num_short == 0 for level in row.levels)
        assert row.levels[1].runs[0].num_ok == 10
        speed = row.figure("output_tokens_per_s", report.workload.throughput_level)
        assert speed is not None
        assert speed.low is None  # one repeat tells nothing of its spread
        assert speed.estimate == row.levels[0].runs[0].output_tokens_per_s > 0
        assert row.memory is not None
        assert row.memory.kv_tokens == 1024
        assert row.memory.peak_bytes - row.memory.peak_without_kv_bytes == row.memory.kv_bytes > 0
    for row in report.rows:
        assert row.quality is not None
        assert row.quality.perplexity == pytest.approx(20, abs=1e-3)
        assert row.quality.kl_mean == pytest.approx(0.0123)
        assert row.quality.agreement.tokens == 128
        assert row.quality.agreement.agrees
    assert report.null.row.quality is None  # weights are the same: speed alone is measured again
    written = json.loads((out / "report.json").read_bytes())
    jsonschema.validate(written, shipped_schema())
    raw = json.loads((out / written["rows"][1]["levels"][1]["runs"][0]["raw"]).read_bytes())
    assert raw["workload"]["model"] == "tiny-model"
    assert (out / "report.html").stat().st_size > 10_000
    lines = list(csv.DictReader(io.StringIO((out / "report.csv").read_text())))
    assert {line["mode"] for line in lines} >= {"bf16", "int8"}
    terminal = (tmp_path / "terminal.txt").read_text()
    assert "tiny-model" in terminal
    assert "int8" in terminal
    mine, theirs = (json.loads((out / row.levels[1].runs[0].raw).read_bytes()) for row in report.rows)
    assert mine["workload"] == theirs["workload"]
    assert due(mine) == pytest.approx(due(theirs))


def test_a_server_that_runs_already_is_a_column_of_speed(
    compare: Compare, options: CompareOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str, bool]] = []

    async def noted_load(url: str, model: str, *rest: Any, is_ours: bool = True) -> None:
        asked.append((url, model, is_ours))
        await fake_run_load(url, model, *rest)

    monkeypatch.setattr(mode, "run_load", noted_load)
    report = compare("bf16", servers=["vllm=http://127.0.0.1:9"], options=once(options))
    assert report.complete
    row = report.rows[1]
    assert (row.name, row.ok, row.memory, row.quality, row.loading) == ("vllm", True, None, None, None)
    assert row.ratio("output_tokens_per_s", "closed-2") is not None
    assert asked.count(("http://127.0.0.1:9", "", False)) == 4
    assert report.verdict is not None
    assert "another server" in report.verdict.rejected["vllm"]
    for name in ("report.html", "report.md", "report.csv", "levels.csv"):
        assert "vllm" in (tmp_path / "report" / name).read_text()


def test_no_full_collection_of_this_process_meets_the_load(
    compare: Compare, options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front shares it with compare: on an H100 walking all of it stood in 5 of 10 engines' figures, as
    a pause of 106 to 190 ms."""
    held: list[object] = []
    walked: list[bool] = []

    async def noted_load(*arguments: Any, **rest: Any) -> None:
        walked.append(any(item is held for item in gc.get_objects()))
        await fake_run_load(*arguments, **rest)

    monkeypatch.setattr(mode, "run_load", noted_load)
    try:
        compare("bf16", options=once(options))
    finally:
        gc.unfreeze()
    assert len(walked) > 4
    assert not any(walked)


def due(result: dict[str, Any]) -> list[float]:
    """When each request of an open loop was due, counted from the first."""
    records = sorted(result["levels"][0]["runs"][0]["requests"], key=lambda record: record["index"])
    return [record["scheduled_s"] for record in records]


def test_a_checkpoint_is_made_before_the_measured_engine_starts(
    compare: Compare,
    options: CompareOptions,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_generator: None,
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
    report = compare("bf16,awq", options=once(options))
    assert starts.count("awq") == 2
    assert starts.count("bf16") == 3  # a first look, the reference, and the reference again
    assert [row.loading and row.loading.quantize_seconds for row in report.rows] == [0.0, 1.75]
    for row in report.rows:
        assert row.loading is not None
        assert row.loading.stages == {"import": 0.1, "load": 0.5}
        assert row.memory is not None
        assert row.memory.peak_load_bytes == 300_000_000
    assert "awq: its checkpoint was made in 1.75 s" in (tmp_path / "report/report.md").read_text()


def test_an_engine_that_was_started_again_is_no_figure(
    compare: Compare, options: CompareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Speed before and quality after would come from two processes."""
    hosts: list[Host] = []

    class WatchedHost(Host):
        async def __aenter__(self) -> Self:
            hosts.append(self)
            return await super().__aenter__()

    async def load_then_kill(*arguments: Any, **rest: Any) -> None:
        await fake_run_load(*arguments, **rest)
        if hosts[-1].settings.precision == "int8":
            process = hosts[-1].supervisor.process
            assert process is not None
            process.kill()
            await hosts[-1].client.wait_for("down")
            await hosts[-1].ready()

    monkeypatch.setattr(mode, "Host", WatchedHost)
    monkeypatch.setattr(mode, "run_load", load_then_kill)
    report = compare("bf16,int8", options=once(options))
    assert [row.status for row in report.rows] == ["ok", "failed"]
    assert "died while it was measured" in report.rows[1].error


def test_metrics_are_where_the_settings_say_and_the_api_is_not(
    compare: Compare, options: CompareOptions, monkeypatch: pytest.MonkeyPatch
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

    async def scraped_load(url: str, *arguments: Any, **rest: Any) -> None:
        assert not url.endswith(f":{metrics_port}")
        scraped.append(await asyncio.to_thread(scrape))
        await fake_run_load(url, *arguments, **rest)

    monkeypatch.setattr(host, "bind", noted_bind)
    monkeypatch.setattr(mode, "run_load", scraped_load)
    settings = {"host": "0.0.0.0", "metrics_port": metrics_port}
    assert compare("bf16,int8", settings, options=once(options)).complete
    engines = 4  # a first look, both modes, and the reference again
    assert bound == engines * [("127.0.0.1", 0), ("0.0.0.0", metrics_port)]
    assert 'precision="bf16"' in scraped[0]
    assert any('precision="int8"' in page for page in scraped)


class Interrupted:
    """`measure` that signals this process when `nf4` has come to a stage; remembers what it had started."""

    def __init__(self, number: signal.Signals, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number, self.stage, self.setenv = number, stage, monkeypatch.setenv
        self.started: list[asyncio.subprocess.Process] = []
        self.spawn, self.run_load = asyncio.create_subprocess_exec, mode.run_load
        self.measured: list[str] = []
        monkeypatch.setattr(asyncio, "create_subprocess_exec", self.remembered)
        monkeypatch.setattr(mode, "run_load", self.watched)

    async def remembered(self, *arguments: Any, **options: Any) -> asyncio.subprocess.Process:
        self.started.append(await self.spawn(*arguments, **options))
        return self.started[-1]

    async def watched(self, *arguments: Any, **rest: Any) -> None:
        if not (self.is_due and self.stage == "traffic"):
            return await fake_run_load(*arguments, **rest)
        before = len(self.started)
        load = asyncio.ensure_future(self.run_load(*arguments, **rest))
        try:
            while len(self.started) == before:
                await asyncio.sleep(0)
            signal.raise_signal(self.number)
            return await load
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)

    is_due = False

    async def __call__(self, job: Job, advance: Advance) -> Finished:
        self.is_due = bool(self.measured)  # the second turn, whichever mode it is
        if self.is_due and self.stage == "load":
            self.setenv("FAKE_HANG_AT_LOAD", "1")

        def noticed(stage: str, share: float) -> None:
            advance(stage, share)
            if self.is_due and stage == self.stage != "traffic":
                signal.raise_signal(self.number)

        finished = await measure(job, noticed)
        self.measured.append(job.mode.name)
        return finished


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
    options: CompareOptions,
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
            compare("bf16,int8,nf4", measure_turn=interrupted, options=replace(options, seed=SEED))
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_interrupt)
    assert not isinstance(error.value, SystemExit) or error.value.code == 143
    assert all(process.returncode is not None for process in interrupted.started)
    partial = json.loads((tmp_path / "report/report.json").read_bytes())
    assert [row["mode"]["name"] for row in partial["rows"]] == interrupted.measured == ["int8"]
    assert partial["not_measured"] == ["bf16", "int8", "nf4", "bf16 again"]
    assert partial["verdict"] is None
    assert not partial["complete"]
    jsonschema.validate(partial, shipped_schema())
    assert "Stopped before bf16" in (tmp_path / "report/report.md").read_text()
