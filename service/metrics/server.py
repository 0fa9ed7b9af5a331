"""The events of a server's life -> counts, by the precision that is served when they happen.

engine_client, guard, host --> Metrics --> Counts

The engine sends deltas with its steps, so counters live here and outlive it. A latency is observed once for
all the streams that shared a step, never once a token.
"""

from collections.abc import Sequence
from math import exp
from typing import Literal

from service import __version__
from service.messages import ERROR_KINDS, EngineInfo, Evaluated, StepStats
from service.metrics import exposition, vllm
from service.metrics.counts import Counts, Labels
from service.metrics.energy_account import EnergyAccount

Compat = Literal["none", "vllm"]

PHASES = ("queue", "prefill", "decode")


class Metrics:
    """What one engine and the front before it did. Built once an engine client; `precision` is what was asked
    for until an engine says what it serves.

    An engine in another precision begins counts of its own, or goes on with those of when it was last served;
    what the others counted stands under their label. `render` makes one page of several clients.
    """

    def __init__(self, model: str, precision: str) -> None:
        self._model = model
        self._of_precision: dict[str, Counts] = {}
        self._was_ready = False
        self._kv_capacity_tokens = 0
        self._queue_limit = 0
        self._energy: EnergyAccount | None = None  # while an engine serves from a GPU
        self._count_in(Counts(model, precision))

    # --- a request's life ----------------------------------------------------------------------

    def accepted(self) -> None:
        """A request was given to the engine."""
        self._counts.add("halftone_requests_accepted_total", 1)

    def rejected(self, reason: str) -> None:
        """A request was answered without being started. `reason` is one of a fixed few words."""
        self._counts.add("halftone_requests_rejected_total", 1, reason)

    def first_token(self, seconds: float) -> None:
        """From a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float, count: int) -> None:
        """`count` tokens came `seconds` after the token before them."""
        self._inter_token.observe(seconds, count)

    def finished(
        self,
        reason: str,
        num_prompt_tokens: int,
        num_tokens: int,
        decode_seconds: float,
        seconds: float,
        error: str = "",
    ) -> None:
        """An accepted request ended `seconds` after its arrival. `decode_seconds`: from its first token to
        its last; `error`: what its last Output said."""
        counts = self._counts
        counts.add("halftone_requests_total", 1, reason)
        if reason == "error":
            counts.add("halftone_request_errors_total", 1, ERROR_KINDS.get(error, "internal"))
        elif reason != "abort":
            self._end_to_end.observe(seconds)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._generated_tokens.observe(num_tokens)
        if num_tokens > 1:
            self._per_token.observe(decode_seconds / (num_tokens - 1))

    def tokens(self, kind: str, count: int) -> None:
        """`count` tokens of `kind`: generated or discarded (the engine's steps count the others)."""
        self._counts.add("halftone_tokens_total", count, kind)

    def http_request(self, endpoint: str, status: int, seconds: float) -> None:
        """An HTTP response ended. `endpoint` is a route's template, never a path that a client chose."""
        self._counts.histogram("halftone_request_duration_seconds", endpoint, str(status)).observe(seconds)

    # --- the engine's life ---------------------------------------------------------------------

    def step(self, stats: StepStats) -> None:
        """One Step message: its deltas are added, its gauges replace the last."""
        counts = self._counts
        if stats.step_seconds:
            self._step.observe(stats.step_seconds)
            self._batch_size.observe(stats.num_running)
            self._step_tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
        if stats.num_prefill_tokens:
            counts.add("halftone_tokens_total", stats.num_prefill_tokens, "prompt")
        if stats.num_cached_tokens:
            counts.add("halftone_tokens_total", stats.num_cached_tokens, "cached")
        if stats.num_preemptions:
            counts.add("halftone_preemptions_total", stats.num_preemptions)
        for name, (outliers, activations) in (stats.outliers or {}).items():
            layer, _, index = name.rpartition(".")
            counts.add("halftone_int8_outliers_total", outliers, layer, index)
            counts.add("halftone_int8_activations_total", activations, layer, index)
        for phase_seconds in stats.ended_phase_seconds:
            for histogram, seconds in zip(self._phases, phase_seconds, strict=False):  # as far as it came
                histogram.observe(seconds)
            if len(phase_seconds) > 1:
                self._inference.observe(sum(phase_seconds[1:]))
        counts.set("halftone_requests_running", stats.num_running)
        counts.set("halftone_requests_waiting", stats.num_waiting)
        counts.set("halftone_kv_cache_tokens", stats.kv_used_tokens, "used")
        counts.set("halftone_kv_cache_tokens", stats.kv_cached_tokens, "reusable")
        capacity = self._kv_capacity_tokens
        counts.set("halftone_kv_cache_usage_ratio", stats.kv_used_tokens / capacity if capacity else 0.0)
        if stats.memory_bytes is not None:
            counts.replace("halftone_memory_bytes", stats.memory_bytes)
        if stats.peak_bytes is not None:
            counts.replace("halftone_memory_peak_bytes", stats.peak_bytes)

    def evaluated(self, message: Evaluated) -> None:
        """An evaluation of the served weights ended well."""
        perplexities = {
            mode: exp(nll / message.tokens[mode]) for mode, nll in message.nll.items() if message.tokens[mode]
        }
        self._counts.replace("halftone_quality_perplexity", perplexities)
        if message.kl_tokens:
            self._counts.set("halftone_quality_divergence_nats", message.kl_mean)
            self._counts.set("halftone_quality_agreement_ratio", message.top1_agreement)

    def loading(self, stage: str, done: int, total: int, unit: str) -> None:
        """An engine on its way to ready said how far it is; its last word of each stage stands."""
        self._counts.set("halftone_loading_done", done, stage, unit)
        self._counts.set("halftone_loading_expected", total, stage, unit)

    def engine_ready(self, info: EngineInfo) -> None:
        """A loaded engine said what it serves."""
        self._end_energy()
        if not self._was_ready:  # what has been counted so far was asked of this one
            self._was_ready = True
            del self._of_precision[self._counts.precision]
            self._counts.precision = info.precision
            self._of_precision[info.precision] = self._counts
        elif info.precision != self._counts.precision:
            self._counts.forget_gauges()
            self._count_in(self._of_precision.get(info.precision) or Counts(self._model, info.precision))
        counts = self._counts
        self._kv_capacity_tokens = info.kv_tokens
        counts.scalars["halftone_build_info"] = {
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
        counts.scalars["halftone_kernel_info"] = {item: 1.0 for item in info.kernels.items()}
        counts.scalars["halftone_kernel_seconds"] = {
            (op, rows): seconds
            for op, by_rows in info.kernel_seconds.items()
            for rows, seconds in by_rows.items()
        }
        counts.replace("halftone_model_load_seconds", info.load_seconds)
        # stages that take no time worth telling say only that they begin
        counts.scalars["halftone_loading_done"] = dict(counts.scalars["halftone_loading_expected"])
        counts.replace("halftone_memory_bytes", info.memory_bytes)
        counts.replace("halftone_memory_peak_bytes", {"load": info.peak_load_bytes})
        counts.set("halftone_kv_cache_tokens", info.kv_tokens, "capacity")
        counts.set("halftone_kv_block_tokens", info.kv_block_tokens)
        counts.set("halftone_requests_limit", info.max_batch_requests, "batch")
        counts.set("halftone_requests_limit", self._queue_limit, "queue")
        if info.device_uuid:
            self._energy = EnergyAccount(counts, info.device_uuid)

    def queue_limit(self, num_requests: int) -> None:
        """Most requests that the front lets be open at once."""
        self._queue_limit = num_requests
        self._counts.set("halftone_requests_limit", num_requests, "queue")

    def engine_state(self, state: str) -> None:
        """The client's state changed."""
        counts = self._counts
        counts.set("halftone_engine_up", state == "ready")
        if state == "starting":
            for name in ("halftone_loading_done", "halftone_loading_expected"):
                counts.scalars[name].clear()
        if state in ("down", "failed"):
            # a dead engine holds nothing; its last figures would stand as if it did
            for name in (
                "halftone_requests_running",
                "halftone_requests_waiting",
                "halftone_kv_cache_usage_ratio",
            ):
                counts.set(name, 0)
            for kv_state in ("used", "reusable"):
                counts.set("halftone_kv_cache_tokens", 0, kv_state)
            counts.replace("halftone_memory_bytes", {})
            self._end_energy()

    def engine_restarted(self) -> None:
        """An engine is started in the place of one that is gone."""
        self._counts.add("halftone_engine_restarts_total", 1)

    def swapped(self, outcome: str, seconds: float) -> None:
        """A swap of the precision ended, one of SWAP_OUTCOMES; requests were held for `seconds`."""
        self._counts.add("halftone_precision_swaps_total", 1, outcome)
        self._counts.histogram("halftone_precision_swap_seconds").observe(seconds)

    # --- the scrape ----------------------------------------------------------------------------

    def numbers(self, name: str) -> dict[Labels, float]:
        """A counter or gauge of the precision that is served now: values of its own labels -> number."""
        return dict(self._counts.scalars[name])

    def counts(self) -> list[Counts]:
        """Of each precision that has been served."""
        return list(self._of_precision.values())

    async def read_energy(self) -> None:
        """Before a scrape: the counts hold the GPU's energy up to now."""
        if self._energy is not None:
            await self._energy.read()

    def render(self, compat: Compat = "none") -> bytes:
        """The body of /metrics, of type CONTENT_TYPE, of a server with this one engine."""
        return render([self], compat)

    # --- inside --------------------------------------------------------------------------------

    def _count_in(self, counts: Counts) -> None:
        """From now on events are this precision's; those of each step are found without a look-up."""
        self._counts = self._of_precision[counts.precision] = counts
        self._first_token = counts.histogram("halftone_time_to_first_token_seconds")
        self._inter_token = counts.histogram("halftone_inter_token_latency_seconds")
        self._per_token = counts.histogram("halftone_time_per_output_token_seconds")
        self._end_to_end = counts.histogram("halftone_end_to_end_seconds")
        self._phases = [counts.histogram(f"halftone_{phase}_seconds") for phase in PHASES]
        self._inference = counts.histogram("halftone_inference_seconds")
        self._prompt_tokens = counts.histogram("halftone_request_prompt_tokens")
        self._generated_tokens = counts.histogram("halftone_request_generated_tokens")
        self._step = counts.histogram("halftone_step_seconds")
        self._step_tokens = counts.histogram("halftone_step_tokens")
        self._batch_size = counts.histogram("halftone_batch_size")

    def _end_energy(self) -> None:
        if self._energy is not None:
            self._energy.close()
            self._energy = None


def render(all_metrics: Sequence[Metrics], compat: Compat = "none") -> bytes:
    """One page for the engines of a server: every family once, with the series of all of them.

    `compat`: `vllm` adds the same numbers under vLLM's names.
    """
    engines = [metrics.counts() for metrics in all_metrics]
    lines: list[str] = []
    exposition.render(lines, [counts for engine in engines for counts in engine])
    if compat == "vllm":
        vllm.render(lines, engines)
    return "\n".join((*lines, "")).encode()
