"""The page of /metrics, read back by prometheus_client's parser."""

import msgspec
import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.messages import ENGINE_DIED, ERROR_KINDS, EngineInfo, Evaluated, StepStats
from service.metrics import Metrics, render
from service.metrics.catalogue import TOKEN_SECONDS
from service.metrics.counts import Histogram


def samples(page: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    wanted = {"model": "demo", "precision": "nf4"} | labels
    return samples(metrics.render()).get((name, frozenset(wanted.items())))


def info(precision: str = "nf4") -> EngineInfo:
    return EngineInfo(
        model_path="/nowhere", architecture="Fake", precision=precision, dtype="bf16", kv_dtype="bf16",
        device="cpu", device_name="fake", torch_version="none", num_parameters=1, vocab_size=10,
        max_context_tokens=64, kv_tokens=640, kv_block_tokens=16, max_batch_tokens=32, max_batch_requests=4,
        eos_token_ids=[], kernels={}, memory_bytes={"weights.codes": 5}, weight_bytes=5, load_seconds={},
        peak_load_bytes=9,
    )  # fmt: skip


def test_a_histogram_is_written_as_prometheus_writes_it() -> None:
    metrics = Metrics("demo", "nf4")
    registry = prometheus_client.CollectorRegistry()
    theirs = prometheus_client.Histogram(
        "halftone_inter_token_latency_seconds", "h", ["model", "precision"], buckets=TOKEN_SECONDS,
        registry=registry,
    ).labels("demo", "nf4")  # fmt: skip
    for seconds in (0.0005, 0.001, 0.0042, 0.0042, 7.0):
        metrics.inter_token(seconds, 1)
        theirs.observe(seconds)
    ours = samples(metrics.render())
    for key, number in samples(prometheus_client.generate_latest(registry)).items():
        if not key[0].endswith("_created"):
            assert ours[key] == pytest.approx(number), key


@pytest.mark.parametrize("model", ['quote "', "back\\slash", "line\nbreak", "\\n", "{}=,"])
def test_a_label_comes_back_as_it_went(model: str) -> None:
    labels = {"model": model, "precision": "bf16"}
    assert ("halftone_engine_up", frozenset(labels.items())) in samples(Metrics(model, "bf16").render())


def test_merged_histograms_count_both() -> None:
    one, other = Histogram((1.0, 2.0)), Histogram((1.0, 2.0))
    one.observe(0.5)
    other.observe(1.5, 3)
    one.merge(other)
    assert (one.cumulative(), one.sum) == ([("1.0", 1), ("2.0", 4), ("+Inf", 4)], 5.0)


def test_why_a_request_failed_is_counted() -> None:
    metrics = Metrics("demo", "nf4")
    for error in (*ERROR_KINDS, ENGINE_DIED):
        metrics.finished("error", 3, 0, 0.0, 0.1, error)
    assert value(metrics, "halftone_requests_total", finish_reason="error") == len(ERROR_KINDS) + 1
    assert value(metrics, "halftone_request_errors_total", kind="engine_died") == 2
    assert value(metrics, "halftone_request_errors_total", kind="prompt") == 3


def test_only_an_answer_has_a_length_in_time() -> None:
    metrics = Metrics("demo", "nf4")
    for reason in ("stop", "length", "abort", "error"):
        metrics.finished(reason, 100, 5, 0.4, 0.5)
    assert value(metrics, "halftone_end_to_end_seconds_count") == 2
    assert value(metrics, "halftone_end_to_end_seconds_sum") == 1.0
    assert value(metrics, "halftone_request_prompt_tokens_sum") == 400
    assert value(metrics, "halftone_request_generated_tokens_sum") == 20


def test_inference_is_prefill_and_decode() -> None:
    metrics = Metrics("demo", "nf4")
    metrics.step(StepStats(ended_phase_seconds=[[4.0, 0.5, 2.0], [4.0, 0.25], [4.0]]))
    assert value(metrics, "halftone_inference_seconds_count") == 2
    assert value(metrics, "halftone_inference_seconds_sum") == 2.75


def test_a_step_counts_its_tokens() -> None:
    metrics = Metrics("demo", "nf4")
    metrics.step(StepStats(step_seconds=0.01, num_prefill_tokens=100, num_decode_tokens=7))
    metrics.step(StepStats())  # a heartbeat is no step
    assert value(metrics, "halftone_step_tokens_sum") == 107
    assert value(metrics, "halftone_step_tokens_count") == 1


def test_quality_is_that_of_the_last_evaluation() -> None:
    metrics = Metrics("demo", "nf4")
    assert value(metrics, "halftone_quality_divergence_nats") is None
    metrics.evaluated(Evaluated(1, 1, 1, {"prefill": 299.5732}, {"prefill": 100}))
    assert value(metrics, "halftone_quality_perplexity", mode="prefill") == pytest.approx(20, rel=1e-4)
    assert value(metrics, "halftone_quality_divergence_nats") is None  # nothing to diverge from
    answer = Evaluated(2, 1, 1, {"prefill": 0.0}, {"prefill": 100}, 0.0123, 100, 0.97)
    metrics.evaluated(answer)
    assert value(metrics, "halftone_quality_divergence_nats") == 0.0123
    assert value(metrics, "halftone_quality_agreement_ratio") == 0.97


def test_ops_are_those_of_the_engine_that_serves() -> None:
    metrics = Metrics("demo", "auto")
    timed = {"attention": {"1": 2e-4, "16": 5e-4}}
    metrics.engine_ready(msgspec.structs.replace(info(), kernel_seconds=timed))
    assert value(metrics, "halftone_kernel_seconds", op="attention", rows="16") == 5e-4
    metrics.engine_ready(info())  # in its place one that timed none
    assert value(metrics, "halftone_kernel_seconds", op="attention", rows="16") is None


def test_limits_stand_beside_what_they_bound() -> None:
    metrics = Metrics("demo", "auto")
    metrics.queue_limit(512)
    metrics.engine_ready(info())
    metrics.engine_ready(info("bf16"))
    assert value(metrics, "halftone_requests_limit", precision="bf16", limit="queue") == 512
    assert value(metrics, "halftone_requests_limit", precision="bf16", limit="batch") == 4


def test_a_page_has_one_head_a_family() -> None:
    page = render([Metrics("demo", "bf16"), Metrics("demo", "nf4")], "vllm").decode().splitlines()
    heads = [line.split()[2] for line in page if line.startswith("# TYPE")]
    assert len(heads) == len(set(heads))
