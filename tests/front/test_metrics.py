"""Names, labels, buckets, and counts that survive the engine."""

import asyncio
import itertools
import os
import signal
import socket

import msgspec
import prometheus_client
import pytest
from engine_rig import running
from fake_engine import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from service.messages import EngineConfig, EngineInfo, StepStats
from service.metrics import Metrics, catalogue, render
from service.metrics.catalogue import (
    END_TO_END_SECONDS,
    FIRST_TOKEN_SECONDS,
    PHASE_SECONDS,
    TOKEN_SECONDS,
)
from service.metrics.counts import Histogram


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(series, labels) -> value, read back by prometheus_client's parser."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = [
        sample
        for (series, series_labels), sample in samples(metrics).items()
        if series == name and labels.items() <= dict(series_labels).items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_token_buckets() -> None:
    """1.25 apart from 1 ms, each step in thirds; service levels are exact."""
    assert TOKEN_SECONDS[:4] == (0.001, 0.001077, 0.00116, 0.00125)
    assert {0.001, 0.00125, 0.001563, 0.001953, 0.002441, 1.262} <= set(TOKEN_SECONDS)
    assert TOKEN_SECONDS[-1] == 1.262
    assert len(TOKEN_SECONDS) == 3 * 32 + 1 + 6
    assert {0.005, 0.01, 0.02, 0.05, 0.1, 0.2} <= set(TOKEN_SECONDS)
    assert all(after / before < 1.079 for before, after in itertools.pairwise(TOKEN_SECONDS))


@given(st.floats(0.0011, 1.2))
def test_steps_of_one_length_have_their_median_within_4_percent(seconds: float) -> None:
    """Prometheus' quantile, where one bucket holds all: its middle."""
    above = next(place for place, bound in enumerate(TOKEN_SECONDS) if seconds <= bound)
    middle = (TOKEN_SECONDS[above - 1] + TOKEN_SECONDS[above]) / 2
    assert abs(middle / seconds - 1) < 0.04


def test_first_token_buckets() -> None:
    assert FIRST_TOKEN_SECONDS[0] == 0.001
    assert FIRST_TOKEN_SECONDS[-1] == 60
    assert {0.05, 0.1, 0.2, 0.5, 1.0, 2.0} <= set(FIRST_TOKEN_SECONDS)
    for bounds in (FIRST_TOKEN_SECONDS, END_TO_END_SECONDS):
        assert all(after / before < 1.079 for before, after in itertools.pairwise(bounds))


bounds_or_between = st.one_of(st.sampled_from(TOKEN_SECONDS), st.floats(0, 3))


@settings(deadline=None)
@given(st.lists(st.tuples(bounds_or_between, st.integers(1, 5))))
def test_histogram_counts_as_prometheus_does(observations: list[tuple[float, int]]) -> None:
    ours = Histogram(TOKEN_SECONDS)
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram("h", "h", buckets=TOKEN_SECONDS, registry=registry)
    for seconds, count in observations:
        ours.observe(seconds, count)
        for _ in range(count):
            theirs.observe(seconds)
    for le, count in ours.cumulative():
        assert registry.get_sample_value("h_bucket", {"le": le}) == count
    assert registry.get_sample_value("h_sum") == pytest.approx(ours.sum)


def test_catalogue_is_what_is_exported() -> None:
    """Every family under its name and type with at least model and precision, and nothing else."""
    metrics = Metrics("demo", "nf4")
    metrics.http_request("/v1/models", 200, 0.01)
    exported = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        exported[name] = family.type, family.documentation
        for sample in family.samples:
            assert sample.labels["model"] == "demo"
            assert sample.labels["precision"] == "nf4"
    assert exported == {family.name: (family.type, family.help) for family in catalogue()}


def test_names_follow_the_conventions() -> None:
    for family in catalogue():
        assert family.name.startswith("halftone_")
        assert family.name.endswith("_total") == (family.type == "counter")
        assert family.help.endswith(".")
        assert family.labels[:2] == ("model", "precision")
        assert bool(family.bounds) == (family.type == "histogram")
        if family.unit:
            assert family.name.removesuffix("_total").endswith(family.unit)


def test_labels_of_every_series_are_declared() -> None:
    metrics = Metrics("demo", "bf16")
    metrics.step(StepStats(step_seconds=0.1, memory_bytes={"weights": 1}, peak_bytes={"decode": 2}))
    metrics.http_request("/metrics", 200, 0.01)
    metrics.loading("load", 1, 2, "bytes")
    declared = {family.name: {*family.labels, "le"} for family in catalogue()}
    for series, labels in samples(metrics):
        name = series if series in declared else series.rpartition("_")[0]
        assert {key for key, _ in labels} | {"le"} == declared[name]


def test_instances_share_nothing() -> None:
    one, other = Metrics("demo", "bf16"), Metrics("demo", "bf16")
    one.accepted()
    one.first_token(0.1)
    assert value(one, "halftone_requests_accepted_total") == 1
    assert value(other, "halftone_requests_accepted_total") == 0
    assert value(other, "halftone_time_to_first_token_seconds_count") == 0


def test_each_precision_keeps_its_own_counts() -> None:
    """A swap must not count bf16's tokens as nf4's, nor leave gauges of what is gone."""
    metrics = Metrics("demo", "auto")
    fake = FakeEngine(socket.socket(), EngineConfig(model_path="/nowhere", precision="bf16"), {})
    metrics.rejected("overloaded")  # before anything was ready: asked of `auto`
    bf16 = fake.info()
    nf4 = msgspec.structs.replace(bf16, precision="nf4")
    for info, num_tokens in ((bf16, 5), (nf4, 7), (bf16, 11)):
        metrics.engine_ready(info)
        metrics.engine_state("ready")
        metrics.tokens("generated", num_tokens)
        metrics.first_token(0.1)
    fake.connection.close()
    generated, first = "halftone_tokens_total", "halftone_time_to_first_token_seconds_count"
    assert value(metrics, generated, precision="bf16", kind="generated") == 16
    assert value(metrics, generated, precision="nf4", kind="generated") == 7
    assert value(metrics, first, precision="bf16") == 2
    assert value(metrics, "halftone_requests_rejected_total", reason="overloaded", precision="bf16") == 1
    assert value(metrics, "halftone_engine_up", precision="bf16") == 1
    gauges = {family.name for family in catalogue() if family.type == "gauge"}
    gone = [name for (name, labels) in samples(metrics) if dict(labels)["precision"] == "nf4"]
    assert not gauges & set(gone)  # a 0 of what is not meant to be up would look like an outage


def test_one_page_for_several_engines_names_each_family_once() -> None:
    both = [Metrics("demo", "bf16"), Metrics("demo", "nf4")]
    both[1].accepted()
    page = render(both).decode()
    assert page.count("# TYPE halftone_requests_accepted_total ") == 1
    assert 'halftone_requests_accepted_total{model="demo",precision="bf16"} 0.0' in page
    assert 'halftone_requests_accepted_total{model="demo",precision="nf4"} 1.0' in page


def test_a_step_adds_deltas_and_replaces_gauges() -> None:
    metrics = Metrics("demo", "bf16")
    stats = StepStats(
        step_seconds=0.004, num_prefill_tokens=10, num_cached_tokens=16, num_running=3, num_waiting=2,
        kv_used_tokens=100, memory_bytes={"weights.codes": 7, "kv.free": 9},
    )  # fmt: skip
    metrics.step(stats)
    metrics.step(stats)
    metrics.step(StepStats(num_running=1))  # a heartbeat
    assert value(metrics, "halftone_tokens_total", kind="prompt") == 20
    assert value(metrics, "halftone_tokens_total", kind="cached") == 32
    assert value(metrics, "halftone_requests_running") == 1
    assert value(metrics, "halftone_requests_waiting") == 0
    assert value(metrics, "halftone_memory_bytes", part="kv.free") == 9
    assert value(metrics, "halftone_step_seconds_count") == 2
    assert value(metrics, "halftone_batch_size_sum") == 6


def test_an_ended_request_counts_in_the_phases_it_came_to() -> None:
    metrics = Metrics("demo", "bf16")
    metrics.step(StepStats(ended_phase_seconds=[[0.25, 0.5, 100.0], [1.0, 2.0], [4.0]]))
    metrics.step(StepStats())
    for phase, count, seconds in (("queue", 3, 5.25), ("prefill", 2, 2.5), ("decode", 1, 100.0)):
        assert value(metrics, f"halftone_{phase}_seconds_count") == count
        assert value(metrics, f"halftone_{phase}_seconds_sum") == seconds


def test_phase_buckets() -> None:
    """Two modes of nearly one speed stay apart, to answers of ten minutes."""
    assert PHASE_SECONDS[0] == 0.001
    assert 450 < PHASE_SECONDS[-1] <= 600
    assert all(after / before < 1.252 for before, after in itertools.pairwise(PHASE_SECONDS))


def info(kv_tokens: int = 1000) -> EngineInfo:
    with socket.socket() as unused:
        config = EngineConfig(model_path="/nowhere", precision="nf4", kv_tokens=kv_tokens)
        return FakeEngine(unused, config, {}).info()


def test_another_engine_takes_up_the_counts_of_the_last() -> None:
    """Counters and histograms go on from where they were; what is said of an engine is the new one's."""
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(info())
    metrics.accepted()
    metrics.first_token(0.1)
    metrics.inter_token(0.01, 7)
    metrics.finished("stop", 3, 8, 0.07, 0.17)
    metrics.tokens("generated", 8)
    metrics.http_request("/v1/completions", 200, 0.2)
    metrics.step(StepStats(step_seconds=0.01, num_prefill_tokens=5, num_preemptions=2, num_running=3))
    before = samples(metrics)
    metrics.engine_state("down")
    metrics.engine_restarted()
    metrics.engine_ready(info(kv_tokens=2000))
    metrics.engine_state("ready")
    after = samples(metrics)
    counted = {family.name for family in catalogue() if family.type != "gauge"}
    for (name, labels), count in before.items():
        if name in counted or name.rpartition("_")[0] in counted:
            added = 1.0 if name == "halftone_engine_restarts_total" else 0.0
            assert after[name, labels] == count + added, name
    assert value(metrics, "halftone_preemptions_total") == 2
    assert value(metrics, "halftone_kv_cache_tokens", state="capacity") == 2000
    metrics.step(StepStats(kv_used_tokens=500, kv_cached_tokens=30))
    assert value(metrics, "halftone_kv_cache_usage_ratio") == 0.25
    assert value(metrics, "halftone_kv_cache_tokens", state="reusable") == 30
    assert value(metrics, "halftone_model_load_seconds", stage="load", precision="nf4") == 0.5


def test_outliers_are_added_up_by_layer() -> None:
    metrics = Metrics("demo", "int8")
    metrics.step(StepStats(outliers={"down_proj.3": [2, 100], "o_proj.0": [0, 50]}))
    metrics.step(StepStats(outliers={"down_proj.3": [1, 100]}))
    assert value(metrics, "halftone_int8_outliers_total", layer="down_proj", index="3") == 3
    assert value(metrics, "halftone_int8_activations_total", layer="down_proj", index="3") == 200
    assert value(metrics, "halftone_int8_outliers_total", layer="o_proj", index="0") == 0


def test_each_stage_of_a_load_stands_until_another_engine_starts() -> None:
    metrics = Metrics("demo", "auto")
    metrics.loading("load", 100, 400, "bytes")
    metrics.loading("load", 400, 400, "bytes")
    metrics.loading("capture", 3, 70, "graphs")
    metrics.engine_state("down")  # where it died
    for stage, unit, done, total in (("load", "bytes", 400, 400), ("capture", "graphs", 3, 70)):
        assert value(metrics, "halftone_loading_done", stage=stage, unit=unit) == done
        assert value(metrics, "halftone_loading_expected", stage=stage, unit=unit) == total
    metrics.engine_state("starting")
    metrics.loading("import", 0, 1, "modules")
    assert {
        dict(labels)["stage"] for name, labels in samples(metrics) if name == "halftone_loading_done"
    } == {"import"}


def test_a_load_is_done_when_the_engine_is_ready() -> None:
    """The stage `check` says that it begins, and nothing more."""
    metrics = Metrics("demo", "auto")
    metrics.loading("check", 0, 1, "kernels")
    metrics.engine_ready(info())
    assert value(metrics, "halftone_loading_done", stage="check", unit="kernels") == 1


@pytest.mark.parametrize("state", ["down", "failed"])
def test_a_dead_engine_holds_nothing(state: str) -> None:
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(info())
    metrics.engine_state("ready")
    assert value(metrics, "halftone_engine_up") == 1
    metrics.step(StepStats(num_running=3, num_waiting=2, kv_used_tokens=100, kv_cached_tokens=50))
    metrics.engine_state(state)
    for gauge in ("engine_up", "requests_running", "requests_waiting", "kv_cache_usage_ratio"):
        assert value(metrics, f"halftone_{gauge}") == 0
    for kv_state in ("used", "reusable"):
        assert value(metrics, "halftone_kv_cache_tokens", state=kv_state) == 0
    assert not [name for name, _ in samples(metrics) if name == "halftone_memory_bytes"]


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_an_engine_that_takes_no_requests_is_not_up(state: str) -> None:
    """But it lives: what it holds stands."""
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(info())
    metrics.step(StepStats(num_running=3))
    metrics.engine_state(state)
    assert value(metrics, "halftone_engine_up") == 0
    assert value(metrics, "halftone_requests_running") == 3


def test_one_token_has_no_time_to_a_next() -> None:
    metrics = Metrics("demo", "bf16")
    metrics.finished("length", 3, 1, 0.0, 0.5)
    metrics.finished("abort", 3, 0, 0.0, 0.5)
    assert value(metrics, "halftone_time_per_output_token_seconds_count") == 0
    metrics.finished("length", 3, 5, 1.0, 2.0)
    assert value(metrics, "halftone_time_per_output_token_seconds_sum") == 0.25


def test_the_other_buckets() -> None:
    """A request from 10 ms to 82 s, each twice the last; a batch to 1024, by powers of two."""
    metrics = Metrics("demo", "bf16")
    metrics.http_request("/v1/models", 200, 0.02)
    metrics.step(StepStats(step_seconds=0.1, num_running=64))
    bounds: dict[str, list[tuple[float, float]]] = {}
    for (name, labels), count in samples(metrics).items():
        if name.endswith("_bucket"):
            bounds.setdefault(name, []).append((float(dict(labels)["le"]), count))
    requests = sorted(bounds["halftone_request_duration_seconds_bucket"])
    assert [bound for bound, _ in requests] == [*(0.01 * 2**n for n in range(14)), float("inf")]
    assert [count for _, count in requests] == [0.0, *[1.0] * 14]
    batches = sorted(bounds["halftone_batch_size_bucket"])
    assert [bound for bound, _ in batches] == [*(2**n for n in range(11)), float("inf")]
    assert [count for _, count in batches] == [0.0] * 6 + [1.0] * 6


def test_a_refusal_is_counted_from_the_first() -> None:
    """A rate over a series that appears with its first event misses that event."""
    metrics = Metrics("demo", "bf16")
    assert value(metrics, "halftone_requests_rejected_total", reason="overloaded") == 0
    for reason in ("stop", "length", "abort", "error"):
        assert value(metrics, "halftone_requests_total", finish_reason=reason) == 0
    for kind in ("prompt", "cached", "generated", "discarded"):
        assert value(metrics, "halftone_tokens_total", kind=kind) == 0


def test_a_label_cannot_break_out() -> None:
    metrics = Metrics('de"mo\n', "bf16")
    assert value(metrics, "halftone_engine_up", model='de"mo\n') == 0


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_counters_never_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 requests, one kill among them, 20 scrapes; in the end accepted = ended, and latencies were seen."""
    monkeypatch.setenv("FAKE_STEP_MS", "1")
    async with running() as rig:
        metrics = rig.metrics
        before: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for scrape in range(20):
            streams = [rig.open([scrape, number], max_tokens=3 + number)[1] for number in range(5)]
            if scrape == 10:
                await streams[0].started.wait()
                os.kill(rig.process_id, signal.SIGKILL)
            await asyncio.gather(*(stream.ended.wait() for stream in streams))
            now = samples(metrics)
            for series, number in before.items():
                if series[0].endswith(("_total", "_bucket", "_count", "_sum")):
                    assert now[series] >= number, series
            before = now
            await rig.client.wait_ready()
        assert value(metrics, "halftone_requests_accepted_total") == 100
        ended = {
            reason: value(metrics, "halftone_requests_total", finish_reason=reason)
            for reason in ("stop", "length", "abort", "error")
        }
        assert sum(ended.values()) == 100
        assert 0 < ended["error"] <= 5
        assert value(metrics, "halftone_engine_restarts_total") == 1
        generated = value(metrics, "halftone_tokens_total", kind="generated")
        first = value(metrics, "halftone_time_to_first_token_seconds_count")
        assert value(metrics, "halftone_inter_token_latency_seconds_count") == generated - first
