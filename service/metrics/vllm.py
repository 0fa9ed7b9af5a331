"""The same numbers under vLLM's names (`metrics_compat = vllm`), for what reads those: vLLM's dashboards,
KServe's autoscaling examples, llm-d's router.

Counts --> `vllm:*` and `http_*` lines of the exposition

Labels are vLLM's `model_name` and `engine`, and `precision` beside them. Buckets are ours, which are finer:
a quantile over `le` does not ask which there are. What has no counterpart here (LoRA, speculation, transfers
of KV) is not exported; nor does vLLM where it is not used.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from service.metrics.catalogue import FAMILIES
from service.metrics.counts import Counts, Histogram, Labels
from service.metrics.exposition import head, histogram_lines, labels, scalar_line

MoreLabels = tuple[tuple[str, str], ...]  # (name, value)

COMMON = ("model_name", "engine", "precision")
STATUS_CLASSES = {str(status): f"{status // 100}xx" for status in range(100, 600)}


@dataclass(frozen=True)
class Twin:
    """One of vLLM's metrics, made of one of ours."""

    name: str
    source: str
    type: Literal["counter", "gauge", "histogram"]
    names: tuple[str, ...] = ()  # of the source's labels; an empty one is summed over
    values: Mapping[str, str] = field(default_factory=dict)  # of the last label; others are left out
    fixed: tuple[tuple[str, str], ...] = ()  # further labels


PROMPT = {"prompt": "", "cached": ""}
TWINS = (
    Twin("vllm:num_requests_running", "halftone_requests_running", "gauge"),
    Twin("vllm:num_requests_waiting", "halftone_requests_waiting", "gauge"),
    Twin("vllm:num_requests_waiting_by_reason", "halftone_requests_waiting", "gauge",
         fixed=(("reason", "capacity"),)),
    Twin("vllm:kv_cache_usage_perc", "halftone_kv_cache_usage_ratio", "gauge"),
    Twin("vllm:prefix_cache_queries_total", "halftone_tokens_total", "counter", ("",), PROMPT),
    Twin("vllm:prefix_cache_hits_total", "halftone_tokens_total", "counter", ("",), {"cached": ""}),
    Twin("vllm:num_preemptions_total", "halftone_preemptions_total", "counter"),
    Twin("vllm:prompt_tokens_total", "halftone_tokens_total", "counter", ("",), PROMPT),
    Twin("vllm:prompt_tokens_by_source_total", "halftone_tokens_total", "counter", ("source",),
         {"prompt": "local_compute", "cached": "local_cache_hit"}),
    Twin("vllm:generation_tokens_total", "halftone_tokens_total", "counter", ("",), {"generated": ""}),
    Twin("vllm:request_success_total", "halftone_requests_total", "counter", ("finished_reason",)),
    Twin("vllm:iteration_tokens_total", "halftone_step_tokens", "histogram"),
    Twin("vllm:time_to_first_token_seconds", "halftone_time_to_first_token_seconds", "histogram"),
    Twin("vllm:inter_token_latency_seconds", "halftone_inter_token_latency_seconds", "histogram"),
    Twin("vllm:request_time_per_output_token_seconds", "halftone_time_per_output_token_seconds", "histogram"),
    Twin("vllm:e2e_request_latency_seconds", "halftone_end_to_end_seconds", "histogram"),
    Twin("vllm:request_queue_time_seconds", "halftone_queue_seconds", "histogram"),
    Twin("vllm:request_prefill_time_seconds", "halftone_prefill_seconds", "histogram"),
    Twin("vllm:request_decode_time_seconds", "halftone_decode_seconds", "histogram"),
    Twin("vllm:request_inference_time_seconds", "halftone_inference_seconds", "histogram"),
    Twin("vllm:request_prompt_tokens", "halftone_request_prompt_tokens", "histogram"),
    Twin("vllm:request_generation_tokens", "halftone_request_generated_tokens", "histogram"),
    Twin("http_requests_total", "halftone_request_duration_seconds", "counter", ("handler", "status"),
         STATUS_CLASSES),
    Twin("http_request_duration_seconds", "halftone_request_duration_seconds", "histogram", ("handler", "")),
)  # fmt: skip
CACHE_CONFIG = "vllm:cache_config_info"
HELP = {family.name: family.help for family in FAMILIES}


def render(lines: list[str], engines: Sequence[Sequence[Counts]]) -> None:
    """Adds every twin, with the series of each engine's precisions; `engine` is its place."""
    for twin in TWINS:
        head(lines, twin.name, twin.type, f"As {twin.source}: {HELP[twin.source]}")
        for place, of_precision in enumerate(engines):
            for counts in of_precision:
                common = (counts.common[0], str(place), counts.common[1])
                for more, number in series(twin, counts):
                    names = (*COMMON, *(name for name, _ in more))
                    told = labels(names, (*common, *(value for _, value in more)))
                    if isinstance(number, Histogram):
                        histogram_lines(lines, twin.name, told, number)
                    else:
                        scalar_line(lines, twin.name, told, number)
    head(lines, CACHE_CONFIG, "gauge", "1; blocks of the KV cache, and tokens in each.")
    for place, of_precision in enumerate(engines):
        for counts in of_precision:
            cache_config(lines, counts, str(place))


def series(twin: Twin, counts: Counts) -> Iterator[tuple[MoreLabels, float | Histogram]]:
    """(labels beside the common ones, number) of each series that the source's make."""
    if twin.type == "histogram":
        merged: dict[MoreLabels, Histogram] = {}
        for values, histogram in counts.histograms[twin.source].items():
            key = twin_labels(twin, values)
            if key is not None:
                merged.setdefault(key, Histogram(histogram.bounds)).merge(histogram)
        yield from merged.items()
        return
    numbers: dict[Labels, float] = counts.scalars.get(twin.source) or {
        values: float(sum(histogram.counts)) for values, histogram in counts.histograms[twin.source].items()
    }
    summed: dict[MoreLabels, float] = {}
    for values, number in numbers.items():
        key = twin_labels(twin, values)
        if key is not None:
            summed[key] = summed.get(key, 0.0) + number
    yield from summed.items()


def twin_labels(twin: Twin, values: Labels) -> MoreLabels | None:
    """The source's label values -> the twin's labels; None: the twin leaves this series out."""
    if twin.values:
        if values[-1] not in twin.values:
            return None
        values = (*values[:-1], twin.values[values[-1]])
    named = zip(twin.names, values, strict=True)
    return (*((name, value) for name, value in named if name), *twin.fixed)


def cache_config(lines: list[str], counts: Counts, engine: str) -> None:
    """Once an engine has said how large its cache is."""
    block = counts.scalars["halftone_kv_block_tokens"].get((), 0)
    if block:
        blocks = counts.scalars["halftone_kv_cache_tokens"][("capacity",)] / block
        names = (*COMMON, "block_size", "num_gpu_blocks")
        values = (counts.common[0], engine, counts.common[1], f"{block:.0f}", f"{blocks:.0f}")
        scalar_line(lines, CACHE_CONFIG, labels(names, values), 1.0)
