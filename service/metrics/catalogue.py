"""What is exported: every family with its labels, its unit and its buckets. Nothing else may be.

All families carry `model` and `precision`, so that two modes can be laid side by side.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

COMMON_LABELS = ("model", "precision")
RATIO = 1.25


def geometric(
    first: float, last: float, merged: Iterable[float] = (), steps_a_ratio: int = 1
) -> tuple[float, ...]:
    """Bounds first * 1.25^n up to `last`, to four digits, each ratio in `steps_a_ratio` equal ones, and those
    where a service level is likely to be set (the share below a level is exact only at a bound)."""
    bounds = set(merged)
    place = 0
    while (bound := first * RATIO ** (place / steps_a_ratio)) < last:
        bounds.add(float(f"{bound:.4g}"))
        place += 1
    return tuple(sorted(map(float, bounds)))


# What a client feels. A decode step takes nearly the same time again and again, so that one bucket can hold
# most of it: three of them in each ratio of 1.25 keep a median within 4 %, where one leaves 12 %.
TOKEN_SECONDS = geometric(0.001, 1.263, (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), 3)
FIRST_TOKEN_SECONDS = geometric(0.001, 60, (0.05, 0.1, 0.2, 0.5, 1, 2, 60), 3)
END_TO_END_SECONDS = geometric(0.001, 600, (0.5, 1, 2, 5, 10, 30, 60, 600), 3)
PHASE_SECONDS = geometric(0.001, 600)
REQUEST_SECONDS = tuple(round(0.01 * 2**n, 2) for n in range(14))
SWAP_SECONDS = tuple(0.25 * 2**n for n in range(15))  # to 68 minutes
POWERS_OF_TWO = tuple(float(2**n) for n in range(11))
TOKENS = tuple(float(2**n) for n in range(18))

# label values that exist from the start: a rate over a series that appears with its first event misses it
TOKEN_KINDS = ("prompt", "cached", "generated", "discarded")
FINISH_REASONS = ("stop", "length", "abort", "error")
SWAP_OUTCOMES = ("swapped", "given_up", "rolled_back", "failed")


@dataclass(frozen=True)
class Family:
    """One metric: what the documentation and the dashboards are checked against."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]  # besides model and precision
    unit: str
    help: str
    bounds: tuple[float, ...] = ()


FAMILIES = (
    Family("halftone_build_info", "gauge",
           ("version", "dtype", "kv_dtype", "device", "device_name", "torch_version", "architecture"),
           "", "1; what is served and on what."),
    Family("halftone_kernel_info", "gauge", ("layer", "kernel"), "", "1; kernel that serves a layer class."),
    Family("halftone_kernel_seconds", "gauge", ("op", "rows"), "seconds",
           "One op of all layers, or lm_head or a greedy draw, in a decode step of so many rows: each timed "
           "alone before ready, with --time-kernels; in a step they overlap."),
    Family("halftone_engine_up", "gauge", (), "", "1 while the engine is ready, else 0."),
    Family("halftone_engine_restarts_total", "counter", (), "",
           "Engines started in the place of one that died."),
    Family("halftone_precision_swaps_total", "counter", ("outcome",), "",
           "Swaps that ended with this precision served, by outcome: swapped (to it), given_up (requests did "
           "not end in time), rolled_back, failed (nothing serves)."),
    Family("halftone_precision_swap_seconds", "histogram", (), "seconds",
           "From the moment on that requests are held for a swap until they go on.", SWAP_SECONDS),
    Family("halftone_model_load_seconds", "gauge", ("stage",), "seconds", "Last load, by stage."),
    Family("halftone_loading_done", "gauge", ("stage", "unit"), "",
           "How far a stage of the present engine's load is, in its unit: bytes, layers, steps, graphs, ..."),
    Family("halftone_loading_expected", "gauge", ("stage", "unit"), "",
           "What halftone_loading_done is at the end of the stage."),
    Family("halftone_memory_bytes", "gauge", ("part",), "bytes",
           "Memory held now, by part of the ledger (docs/memory.md)."),
    Family("halftone_memory_peak_bytes", "gauge", ("phase",), "bytes",
           "Highest memory of the engine's process, by phase: load, prefill, decode."),
    Family("halftone_energy_joules_total", "counter", (), "joules",
           "Energy of the whole GPU, other users' share included, while this precision was served; none on a "
           "CPU."),
    Family("halftone_power_watts", "gauge", (), "watts",
           "Power of the whole GPU, by its driver's mean over the last second; none on a CPU."),
    Family("halftone_time_to_first_token_seconds", "histogram", (), "seconds",
           "From arrival at the server to the first token.", FIRST_TOKEN_SECONDS),
    Family("halftone_inter_token_latency_seconds", "histogram", (), "seconds",
           "From one token of a request to its next.", TOKEN_SECONDS),
    Family("halftone_time_per_output_token_seconds", "histogram", (), "seconds",
           "Mean over a request's tokens after the first.", TOKEN_SECONDS),
    Family("halftone_end_to_end_seconds", "histogram", (), "seconds",
           "From arrival at the server to the end of the answer, where it ended by stop or length.",
           END_TO_END_SECONDS),
    Family("halftone_queue_seconds", "histogram", (), "seconds",
           "From a request's arrival at the engine to its first step, or to an abort before it.",
           PHASE_SECONDS),
    Family("halftone_prefill_seconds", "histogram", (), "seconds",
           "From a request's first step to its first token, or to an end without one.", PHASE_SECONDS),
    Family("halftone_decode_seconds", "histogram", (), "seconds",
           "From a request's first token to its end; an answer of one token has none.", PHASE_SECONDS),
    Family("halftone_inference_seconds", "histogram", (), "seconds",
           "From a request's first step to its end: prefill and decode.", PHASE_SECONDS),
    Family("halftone_request_duration_seconds", "histogram", ("endpoint", "status"), "seconds",
           "From an HTTP request's arrival to the end of its response.", REQUEST_SECONDS),
    Family("halftone_request_prompt_tokens", "histogram", (), "", "Prompt of a request that ended.", TOKENS),
    Family("halftone_request_generated_tokens", "histogram", (), "",
           "Tokens that a request had been given when it ended.", TOKENS),
    Family("halftone_step_seconds", "histogram", (), "seconds", "One step of the engine.", TOKEN_SECONDS),
    Family("halftone_step_tokens", "histogram", (), "",
           "Tokens computed in one step, of prompts and answers.", TOKENS),
    Family("halftone_batch_size", "histogram", (), "", "Requests in one step.", POWERS_OF_TWO),
    Family("halftone_tokens_total", "counter", ("kind",), "",
           "Tokens by kind: prompt (computed), cached (prompt tokens found in the prefix cache), generated, "
           "discarded (of the generated, those behind a stop or an abort)."),
    Family("halftone_requests_accepted_total", "counter", (), "",
           "Requests given to the engine; each ends once in halftone_requests_total."),
    Family("halftone_requests_total", "counter", ("finish_reason",), "",
           "Requests that ended, by reason: stop, length, abort, error."),
    Family("halftone_request_errors_total", "counter", ("kind",), "",
           "Of the requests that ended by error, why: model, step, memory, prompt (refused by the engine), "
           "engine_died, shutdown, internal."),
    Family("halftone_requests_rejected_total", "counter", ("reason",), "",
           "Requests that never started: overloaded, invalid, unauthorized or the engine's state."),
    Family("halftone_requests_running", "gauge", (), "", "Requests in the engine's batch."),
    Family("halftone_requests_waiting", "gauge", (), "", "Requests that the engine has not started."),
    Family("halftone_requests_limit", "gauge", ("limit",), "",
           "Most requests at once: batch (in one step), queue (open in the server; one more is refused)."),
    Family("halftone_preemptions_total", "counter", (), "", "Requests put back for room in the KV cache."),
    Family("halftone_int8_outliers_total", "counter", ("layer", "index"), "",
           "Activations that int8 multiplied in 16 bits, by layer class and number; counted on a GPU."),
    Family("halftone_int8_activations_total", "counter", ("layer", "index"), "",
           "All activations that int8 multiplied, likewise; the outliers' part of them is the 16-bit share."),
    Family("halftone_kv_cache_usage_ratio", "gauge", (), "", "Share of the KV cache in use, 0 to 1."),
    Family("halftone_kv_cache_tokens", "gauge", ("state",), "",
           "Tokens in the KV cache by state: used, reusable (held only for their prefix), capacity."),
    Family("halftone_kv_block_tokens", "gauge", (), "", "Tokens in one block of the KV cache."),
    Family("halftone_quality_perplexity", "gauge", ("mode",), "",
           "Of the last text that the served weights were evaluated on, by prefill and decode."),
    Family("halftone_quality_divergence_nats", "gauge", (), "nats",
           "Mean KL divergence from the reference per token, in the last evaluation that had one."),
    Family("halftone_quality_agreement_ratio", "gauge", (), "",
           "Share of tokens whose likeliest is the reference's, likewise."),
)  # fmt: skip


def catalogue() -> list[Family]:
    """Every metric with all of its labels."""
    return [Family(f.name, f.type, (*COMMON_LABELS, *f.labels), f.unit, f.help, f.bounds) for f in FAMILIES]
