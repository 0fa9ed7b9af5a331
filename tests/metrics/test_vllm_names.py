"""What reads vLLM's metrics finds them: names, labels, and the numbers of our own."""

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.messages import EngineInfo, StepStats
from service.metrics import TWINS, Metrics, catalogue, render
from tests.metrics.test_exposition import info

# read from what each of them ships or documents, November 2026
LLM_D_ROUTER = {
    "vllm:num_requests_waiting",
    "vllm:num_requests_running",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
}
KSERVE = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
OVERVIEW_DASHBOARD = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:prompt_tokens_by_source_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:iteration_tokens_total_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "http_requests_total",
}


@pytest.fixture
def metrics() -> Metrics:
    """A server that has answered one request."""
    metrics = Metrics("demo", "auto")
    metrics.engine_ready(info())
    metrics.engine_state("ready")
    metrics.accepted()
    metrics.first_token(0.1)
    metrics.inter_token(0.01, 7)
    metrics.tokens("generated", 8)
    metrics.step(
        StepStats(
            step_seconds=0.01, num_prefill_tokens=30, num_cached_tokens=16, num_preemptions=2, num_running=3,
            num_waiting=1, kv_used_tokens=64, ended_phase_seconds=[[0.1, 0.2, 0.3]],
        )
    )  # fmt: skip
    metrics.finished("stop", 46, 8, 0.07, 0.17)
    for status in (200, 200, 404, 503):
        metrics.http_request("/v1/completions", status, 0.2)
    return metrics


def lines(metrics: Metrics) -> dict[str, float]:
    """`name{labels}` as it stands in the page, without our own and without a bucket's bounds."""
    page = metrics.render("vllm").decode()
    rows = [line.rpartition(" ") for line in page.splitlines() if not line.startswith(("#", "halftone_"))]
    return {series: float(number) for series, _, number in rows}


def test_everything_that_is_read_is_there(metrics: Metrics) -> None:
    names = {series.partition("{")[0] for series in lines(metrics)}
    assert names >= LLM_D_ROUTER | KSERVE | OVERVIEW_DASHBOARD


def test_nothing_of_it_without_being_asked(metrics: Metrics) -> None:
    page = metrics.render().decode()
    assert not re.search(r"^(vllm:|http_)", page, re.MULTILINE)
    assert metrics.render("vllm").decode().startswith(page.rstrip("\n"))


def test_every_series_has_vllms_labels_and_the_precision(metrics: Metrics) -> None:
    for series in lines(metrics):
        assert re.search(r'\{model_name="demo",engine="0",precision="nf4"[,}]', series), series


@pytest.mark.parametrize(
    ("name", "more", "number"),
    [
        ("vllm:num_requests_running", "", 3),
        ("vllm:num_requests_waiting", "", 1),
        ("vllm:num_requests_waiting_by_reason", ',reason="capacity"', 1),
        ("vllm:kv_cache_usage_perc", "", 0.1),
        ("vllm:prompt_tokens_total", "", 46),
        ("vllm:prompt_tokens_by_source_total", ',source="local_compute"', 30),
        ("vllm:prompt_tokens_by_source_total", ',source="local_cache_hit"', 16),
        ("vllm:prefix_cache_queries_total", "", 46),
        ("vllm:prefix_cache_hits_total", "", 16),
        ("vllm:generation_tokens_total", "", 8),
        ("vllm:num_preemptions_total", "", 2),
        ("vllm:request_success_total", ',finished_reason="stop"', 1),
        ("vllm:iteration_tokens_total_sum", "", 30),
        ("vllm:time_to_first_token_seconds_sum", "", 0.1),
        ("vllm:inter_token_latency_seconds_count", "", 7),
        ("vllm:request_time_per_output_token_seconds_sum", "", 0.01),
        ("vllm:e2e_request_latency_seconds_sum", "", 0.17),
        ("vllm:request_inference_time_seconds_sum", "", 0.5),
        ("vllm:request_prompt_tokens_sum", "", 46),
        ("vllm:request_generation_tokens_sum", "", 8),
        ("http_requests_total", ',handler="/v1/completions",status="2xx"', 2),
        ("http_requests_total", ',handler="/v1/completions",status="5xx"', 1),
        ("http_request_duration_seconds_count", ',handler="/v1/completions"', 4),
        ("vllm:cache_config_info", ',block_size="16",num_gpu_blocks="40"', 1),
    ],
)
def test_numbers_are_our_own(metrics: Metrics, name: str, more: str, number: float) -> None:
    series = f'{name}{{model_name="demo",engine="0",precision="nf4"{more}}}'
    assert lines(metrics)[series] == pytest.approx(number)


def test_types_are_vllms(metrics: Metrics) -> None:
    """As prometheus_client reads them: a counter's name ends in `_total`, a histogram's does not matter."""
    types = {
        family.name: family.type for family in text_string_to_metric_families(metrics.render("vllm").decode())
    }
    for twin in TWINS:
        name = twin.name.removesuffix("_total") if twin.type == "counter" else twin.name
        assert types[name] == twin.type


def test_sources_exist() -> None:
    families = {family.name: family for family in catalogue()}
    for twin in TWINS:
        assert len(twin.names) == len(families[twin.source].labels) - 2, twin.name


def test_two_engines_are_told_apart(metrics: Metrics) -> None:
    other = Metrics("demo", "auto")
    ready: EngineInfo = info("bf16")
    other.engine_ready(ready)
    page = render([metrics, other], "vllm").decode()
    assert 'vllm:num_requests_running{model_name="demo",engine="0",precision="nf4"} 3.0' in page
    assert 'vllm:num_requests_running{model_name="demo",engine="1",precision="bf16"} 0.0' in page
