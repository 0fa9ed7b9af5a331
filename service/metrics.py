"""Every Prometheus name, label, unit and bucket, and the counts behind them.

engine_client, api/ --events--> Metrics --render()--> /metrics

The engine sends deltas with its steps, so counters live here and outlive it. Own counters instead of
prometheus_client's: a step adds n equal observations in one call, and takes no lock (everything runs on the
event loop). All series carry `model` and `precision`, so that two modes can be laid side by side: of two
servers, of one that holds both, or of one whose precision was swapped.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from service import __version__
from service.messages import EngineInfo, StepStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
COMMON_LABELS = ("model", "precision")


def geometric(first: float, last: float, merged: Iterable[float] = ()) -> tuple[float, ...]:
    """Bounds first * 1.25^n up to `last`, to four digits, and those where a service level is likely to be set
    (the share below a level is exact only at a bound)."""
    bounds = set(merged)
    bound = first
    while bound < last:
        bounds.add(float(f"{bound:.4g}"))
        bound *= 1.25
    return tuple(sorted(bounds))


# 33 steps of 1.25 from 1 ms: 3.5 ms and 6.5 ms a token are two modes, and must not share a bucket
TOKEN_SECONDS = geometric(0.001, 1.263, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2))
FIRST_TOKEN_SECONDS = geometric(0.002, 60, (0.05, 0.1, 0.2, 0.5, 1, 2, 60))
DECODE_SECONDS = geometric(0.01, 600)
REQUEST_SECONDS = tuple(round(0.01 * 2**n, 2) for n in range(14))
POWERS_OF_TWO = tuple(float(2**n) for n in range(11))


@dataclass(frozen=True)
class Family:
    """One metric: what the documentation and the dashboards are checked against."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]  # besides model and precision
    unit: str
    help: str
    bounds: tuple[float, ...] = ()


_FAMILIES = (
    Family("halftone_build_info", "gauge",
           ("version", "dtype", "kv_dtype", "device", "device_name", "torch_version", "architecture"),
           "", "1; what is served and on what."),
    Family("halftone_kernel_info", "gauge", ("layer", "kernel"), "", "1; kernel that serves a layer class."),
    Family("halftone_engine_up", "gauge", (), "", "1 while the engine is ready, else 0."),
    Family("halftone_engine_restarts_total", "counter", (), "", "Engines started after the first."),
    Family("halftone_model_load_seconds", "gauge", ("stage",), "seconds", "Last load, by stage."),
    Family("halftone_loading_done", "gauge", ("stage", "unit"), "",
           "How far a stage of the present engine's load is, in its unit: bytes, layers, steps, graphs, ..."),
    Family("halftone_loading_expected", "gauge", ("stage", "unit"), "",
           "What halftone_loading_done is at the end of the stage."),
    Family("halftone_memory_bytes", "gauge", ("part",), "bytes",
           "Memory held now, by part of the ledger (docs/memory.md)."),
    Family("halftone_memory_peak_bytes", "gauge", ("phase",), "bytes",
           "Highest memory of the engine's process, by phase: load, prefill, decode."),
    Family("halftone_time_to_first_token_seconds", "histogram", (), "seconds",
           "From arrival at the server to the first token.", FIRST_TOKEN_SECONDS),
    Family("halftone_inter_token_latency_seconds", "histogram", (), "seconds",
           "From one token of a request to its next.", TOKEN_SECONDS),
    Family("halftone_time_per_output_token_seconds", "histogram", (), "seconds",
           "Mean over a request's tokens after the first.", TOKEN_SECONDS),
    Family("halftone_queue_seconds", "histogram", (), "seconds",
           "From a request's arrival at the engine to its first step, or to an abort before it.",
           FIRST_TOKEN_SECONDS),
    Family("halftone_prefill_seconds", "histogram", (), "seconds",
           "From a request's first step to its first token, or to an end without one.",
           FIRST_TOKEN_SECONDS),
    Family("halftone_decode_seconds", "histogram", (), "seconds",
           "From a request's first token to its end; an answer of one token has none.", DECODE_SECONDS),
    Family("halftone_request_duration_seconds", "histogram", ("endpoint", "status"), "seconds",
           "From an HTTP request's arrival to the end of its response.", REQUEST_SECONDS),
    Family("halftone_step_seconds", "histogram", (), "seconds", "One step of the engine.", TOKEN_SECONDS),
    Family("halftone_batch_size", "histogram", (), "", "Requests in one step.", POWERS_OF_TWO),
    Family("halftone_tokens_total", "counter", ("kind",), "",
           "Tokens by kind: prompt (computed), cached (prompt tokens found in the prefix cache), generated, "
           "discarded (of the generated, those behind a stop or an abort)."),
    Family("halftone_requests_accepted_total", "counter", (), "",
           "Requests given to the engine; each ends once in halftone_requests_total."),
    Family("halftone_requests_total", "counter", ("finish_reason",), "",
           "Requests that ended, by reason: stop, length, abort, error."),
    Family("halftone_requests_rejected_total", "counter", ("reason",), "",
           "Requests that never started: overloaded, invalid, unauthorized or the engine's state."),
    Family("halftone_requests_running", "gauge", (), "", "Requests in the engine's batch."),
    Family("halftone_requests_waiting", "gauge", (), "", "Requests that the engine has not started."),
    Family("halftone_preemptions_total", "counter", (), "", "Requests put back for room in the KV cache."),
    Family("halftone_int8_outliers_total", "counter", ("layer", "index"), "",
           "Activations that int8 multiplied in 16 bits, by layer class and number; counted on a GPU."),
    Family("halftone_int8_activations_total", "counter", ("layer", "index"), "",
           "All activations that int8 multiplied, likewise; the outliers' part of them is the 16-bit share."),
    Family("halftone_kv_cache_usage_ratio", "gauge", (), "", "Share of the KV cache in use, 0 to 1."),
    Family("halftone_kv_cache_tokens", "gauge", ("state",), "",
           "Tokens in the KV cache by state: used, reusable (held only for their prefix), capacity."),
)  # fmt: skip


def catalogue() -> list[Family]:
    """Every metric with all of its labels."""
    return [Family(f.name, f.type, (*COMMON_LABELS, *f.labels), f.unit, f.help, f.bounds) for f in _FAMILIES]


class Histogram:
    """Counts of observations in (previous bound, bound]; the last count is above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def cumulative(self) -> list[tuple[str, float]]:
        """(le, observations up to it), as Prometheus wants them."""
        total = 0
        buckets = []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


class Series:
    """What was counted while one precision was served."""

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.scalars: dict[str, dict[tuple[str, ...], float]] = {}
        self.histograms: dict[str, dict[tuple[str, ...], Histogram]] = {}
        for family in _FAMILIES:
            if family.type == "histogram":
                self.histograms[family.name] = {} if family.labels else {(): Histogram(family.bounds)}
            else:
                self.scalars[family.name] = {} if family.labels else {(): 0.0}
        # these series exist from the start: a rate over one that appears with its first event misses it
        for kind in ("prompt", "cached", "generated", "discarded"):
            self.scalars["halftone_tokens_total"][(kind,)] = 0.0
        for reason in ("stop", "length", "abort", "error"):
            self.scalars["halftone_requests_total"][(reason,)] = 0.0
        self.scalars["halftone_requests_rejected_total"][("overloaded",)] = 0.0

    def retire(self) -> None:
        """Another precision is served in this one's place: counters stay, gauges of now go."""
        for family in _FAMILIES:
            if family.type == "gauge":
                self.scalars[family.name] = {}
        self.scalars["halftone_engine_up"] = {(): 0.0}


class Metrics:
    """The counts of one engine client. `precision` is what was asked for until an engine says what it serves.
    When an engine serves another, its series begin, or go on where they were when it was last served."""

    def __init__(self, model: str, precision: str) -> None:
        self.model = model
        self._of_precision: dict[str, Series] = {}
        self._was_ready = False
        self._kv_capacity_tokens = 0
        self._count_in(Series(precision))
        self.registry = registry_of([self])

    # --- a request's life ----------------------------------------------------------------------

    def accepted(self) -> None:
        """A request was given to the engine."""
        self._add("halftone_requests_accepted_total", 1)

    def rejected(self, reason: str) -> None:
        """A request was answered without being started. `reason` is one of a fixed few words."""
        self._add("halftone_requests_rejected_total", 1, reason)

    def first_token(self, seconds: float) -> None:
        """From a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        """`count` tokens came `seconds` after the token before them."""
        self._inter_token.observe(seconds, count)

    def finished(self, reason: str, num_tokens: int, decode_seconds: float) -> None:
        """An accepted request ended. `decode_seconds`: from its first token to its last."""
        self._add("halftone_requests_total", 1, reason)
        if num_tokens > 1:
            self._per_token.observe(decode_seconds / (num_tokens - 1))

    def tokens(self, kind: str, count: int) -> None:
        """`count` tokens of `kind`: generated or discarded (the engine's steps count the others)."""
        self._add("halftone_tokens_total", count, kind)

    def http_request(self, endpoint: str, status: int, seconds: float) -> None:
        """An HTTP response ended. `endpoint` is a route's template, never a path that a client chose."""
        series = self._now.histograms["halftone_request_duration_seconds"]
        labels = (endpoint, str(status))
        if labels not in series:
            series[labels] = Histogram(REQUEST_SECONDS)
        series[labels].observe(seconds)

    # --- the engine's life ---------------------------------------------------------------------

    def step(self, stats: StepStats) -> None:
        """One Step message: its deltas are added, its gauges replace the last."""
        if stats.step_seconds:
            self._step.observe(stats.step_seconds)
            self._batch_size.observe(stats.num_running)
        if stats.num_prefill_tokens:
            self._add("halftone_tokens_total", stats.num_prefill_tokens, "prompt")
        if stats.num_cached_tokens:
            self._add("halftone_tokens_total", stats.num_cached_tokens, "cached")
        if stats.num_preemptions:
            self._add("halftone_preemptions_total", stats.num_preemptions)
        for name, (outliers, activations) in (stats.outliers or {}).items():
            layer, _, index = name.rpartition(".")
            self._add("halftone_int8_outliers_total", outliers, layer, index)
            self._add("halftone_int8_activations_total", activations, layer, index)
        for seconds_in_phases in stats.ended_phase_seconds:
            for histogram, seconds in zip(self._phases, seconds_in_phases, strict=False):  # as far as it came
                histogram.observe(seconds)
        self._set("halftone_requests_running", stats.num_running)
        self._set("halftone_requests_waiting", stats.num_waiting)
        self._set("halftone_kv_cache_tokens", stats.kv_used_tokens, "used")
        self._set("halftone_kv_cache_tokens", stats.kv_cached_tokens, "reusable")
        capacity = self._kv_capacity_tokens
        self._set("halftone_kv_cache_usage_ratio", stats.kv_used_tokens / capacity if capacity else 0.0)
        if stats.memory_bytes is not None:
            self._replace("halftone_memory_bytes", stats.memory_bytes)
        if stats.peak_bytes is not None:
            self._replace("halftone_memory_peak_bytes", stats.peak_bytes)

    def loading(self, stage: str, done: int, total: int, unit: str) -> None:
        """An engine on its way to ready said how far it is; its last word of each stage stands."""
        self._set("halftone_loading_done", done, stage, unit)
        self._set("halftone_loading_expected", total, stage, unit)

    def engine_ready(self, info: EngineInfo) -> None:
        """A loaded engine said what it serves."""
        if not self._was_ready:  # what has been counted so far was asked of this one
            self._was_ready = True
            del self._of_precision[self._now.precision]
            self._now.precision = info.precision
            self._of_precision[info.precision] = self._now
        elif info.precision != self._now.precision:
            self._now.retire()
            self._count_in(self._of_precision.get(info.precision) or Series(info.precision))
        self._kv_capacity_tokens = info.kv_tokens
        self._now.scalars["halftone_build_info"] = {
            (
                __version__,
                info.dtype,
                info.kv_dtype,
                info.device,
                info.device_name,
                info.torch_version,
                info.architecture,
            ): 1.0
        }
        self._now.scalars["halftone_kernel_info"] = {item: 1.0 for item in info.kernels.items()}
        self._replace("halftone_model_load_seconds", info.load_seconds)
        self._replace("halftone_memory_bytes", info.memory_bytes)
        self._replace("halftone_memory_peak_bytes", {"load": info.peak_load_bytes})
        self._set("halftone_kv_cache_tokens", info.kv_tokens, "capacity")

    def engine_state(self, state: str) -> None:
        """The client's state changed."""
        self._set("halftone_engine_up", state == "ready")
        if state == "starting":
            for name in ("halftone_loading_done", "halftone_loading_expected"):
                self._now.scalars[name].clear()
        if state in ("down", "failed"):
            # a dead engine holds nothing; its last figures would stand as if it did
            for name in (
                "halftone_requests_running",
                "halftone_requests_waiting",
                "halftone_kv_cache_usage_ratio",
            ):
                self._set(name, 0)
            for kv_state in ("used", "reusable"):
                self._set("halftone_kv_cache_tokens", 0, kv_state)
            self._replace("halftone_memory_bytes", {})

    def engine_restarted(self) -> None:
        """An engine is started in the place of one that is gone."""
        self._add("halftone_engine_restarts_total", 1)

    # --- the scrape ----------------------------------------------------------------------------

    def render(self) -> bytes:
        """The body of /metrics, of type CONTENT_TYPE."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """Every family with the series of this client alone."""
        return collected([self])

    def fill(self, family: Family, metric: Metric) -> None:
        """Adds the samples of each precision that has been served."""
        for series in self._of_precision.values():
            common = (self.model, series.precision)
            if isinstance(metric, HistogramMetricFamily):
                for values, histogram in series.histograms[family.name].items():
                    metric.add_metric((*common, *values), histogram.cumulative(), histogram.sum)
            elif isinstance(metric, CounterMetricFamily | GaugeMetricFamily):
                for values, value in series.scalars[family.name].items():
                    metric.add_metric((*common, *values), value)

    # --- inside --------------------------------------------------------------------------------

    def _count_in(self, series: Series) -> None:
        """From now on events are this precision's; those of each step are found without a look-up."""
        self._now = self._of_precision[series.precision] = series
        self._first_token = series.histograms["halftone_time_to_first_token_seconds"][()]
        self._inter_token = series.histograms["halftone_inter_token_latency_seconds"][()]
        self._per_token = series.histograms["halftone_time_per_output_token_seconds"][()]
        phases = ("queue", "prefill", "decode")
        self._phases = [series.histograms[f"halftone_{phase}_seconds"][()] for phase in phases]
        self._step = series.histograms["halftone_step_seconds"][()]
        self._batch_size = series.histograms["halftone_batch_size"][()]

    def _add(self, name: str, amount: float, *labels: str) -> None:
        series = self._now.scalars[name]
        series[labels] = series.get(labels, 0.0) + amount

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._now.scalars[name][labels] = value

    def _replace(self, name: str, values: Mapping[str, float]) -> None:
        self._now.scalars[name] = {(label,): float(value) for label, value in values.items()}


class Scrape:
    """What a registry asks at a scrape."""

    def __init__(self, metrics: Sequence[Metrics]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return collected(self._metrics)


def collected(all_metrics: Sequence[Metrics]) -> Iterator[Metric]:
    """Every family once, with the series of all clients: a page names each family one time."""
    kinds = {"histogram": HistogramMetricFamily, "counter": CounterMetricFamily, "gauge": GaugeMetricFamily}
    for family in catalogue():
        metric = kinds[family.type](family.name, family.help, labels=family.labels)
        for metrics in all_metrics:
            metrics.fill(family, metric)
        yield metric


def registry_of(all_metrics: Sequence[Metrics]) -> CollectorRegistry:
    """One page for the clients of a server; `generate_latest` of it is the body of /metrics."""
    registry = CollectorRegistry()
    registry.register(Scrape(all_metrics))
    return registry
