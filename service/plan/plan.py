"""Which precisions fit a device, what they leave for users, and which to take: figures and words.

Shape, Device, Question --make_plan--> Plan --> cli/plan, GET /plan
"""

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from service.disk import megabytes
from service.errors import PrecisionError
from service.ledger import BLOCK_TOKENS, requests_in, weight_bytes
from service.model.layout import layer_groups
from service.model.sizes import all_linears, for_model, group_size_of
from service.plan.devices import Device
from service.plan.estimate import Estimate, Serving, estimate
from service.plan.question import DEFAULT_CONTEXT_TOKENS, Question
from service.plan.roofline import roofline
from service.plan.shape import Shape
from service.precision import TABLE, Precision, parse_precision
from service.precision.sizes import weights

FULL = ("fp32", "bf16", "fp16")
E4M3_MULTIPLE = 16  # of in and out features, on a GPU
FASTER = 1.1  # from here on a faster mode is worth a word


class PlannedMode(msgspec.Struct):
    """One precision on this device. Figures are 0 where it cannot be served, or its speed is not known."""

    precision: str
    kv_dtype: str
    verdict: str  # yes; holds N requests; no, and why
    holds_all: bool  # as many requests as were asked about
    bits_per_weight: float = 0.0  # of the linears, scales and all
    weight_bytes: int = 0
    total_bytes: int = 0  # of the device, with a KV cache as large as the server would make it
    needed_bytes: int = 0  # memory that a device needs for what was asked
    kv_token_bytes: int = 0
    kv_tokens: int = 0
    max_requests: int = 0  # at once, each of the length that was asked about
    tokens_per_s: float = 0.0  # roofline: at so many requests as were asked about, or as fit
    one_request_tokens_per_s: float = 0.0  # roofline
    prefill_s: float = 0.0  # roofline, of one request
    bound_by: str = ""
    parts: dict[str, int] = msgspec.field(default_factory=dict)


class Plan(msgspec.Struct):
    model: str
    architecture: str
    num_parameters: int
    device: str
    device_bytes: int
    bandwidth_bytes_per_s: float  # 0: not known, then no speeds are
    context_tokens: int
    concurrency: int
    modes: list[PlannedMode]
    take: str  # precision; empty: none holds what was asked
    why: str


@dataclass(frozen=True)
class Server:
    """How it would be started, beside what the question says; the defaults are those of `serve` on a GPU."""

    kv_dtype: str = "auto"
    serving: Serving = field(default_factory=lambda: Serving(256, 2048, 0.9))


def make_plan(
    model: str, shape: Shape, device: Device, question: Question, server: Server, own_precision: str = ""
) -> Plan:
    """`own_precision`: of a checkpoint that is quantized already, the only one that it can be served in.

    Raises PrecisionError where such a checkpoint's precision is not known.
    """
    kv_dtype = question.kv_dtype or server.kv_dtype
    window = server.serving.max_context_tokens or shape.config.max_context_tokens
    question = replace(
        question, context_tokens=question.context_tokens or min(DEFAULT_CONTEXT_TOKENS, window)
    )
    serving = replace(
        server.serving, max_batch_requests=max(server.serving.max_batch_requests, question.concurrency)
    )
    modes = [
        plan_mode(text, kv_dtype, shape, device, question, serving, own_precision)
        for text in question.precisions or default_precisions(shape, own_precision)
    ]
    take, why = choose(modes, device, question)
    return Plan(
        model,
        shape.config.architecture,
        shape.num_parameters,
        device.name,
        device.memory_bytes,
        device.bandwidth,
        question.context_tokens,
        question.concurrency,
        modes,
        take,
        why,
    )


def default_precisions(shape: Shape, own_precision: str) -> list[str]:
    """All that can be asked for: one of the full ones, and every other row of the table."""
    if shape.quantization is not None:
        return [own_precision]
    return [shape.full_precision, *(name for name in TABLE if name not in FULL)]


def plan_mode(
    text: str,
    kv_dtype: str,
    shape: Shape,
    device: Device,
    question: Question,
    serving: Serving,
    own_precision: str,
) -> PlannedMode:
    config = shape.config
    mode = PlannedMode(text, kv_dtype, "", False)
    try:
        precision = for_model(parse_precision(text), config, group_size_of(shape.quantization))
        require_served(precision, kv_dtype, shape, device, own_precision)
        found = estimate(config, precision, kv_dtype, device, serving)
    except PrecisionError as error:
        mode.verdict = f"no: {error.message}"
        return mode
    context_blocks = -(-question.context_tokens // BLOCK_TOKENS)
    mode.parts = found.parts
    mode.weight_bytes, mode.total_bytes = weight_bytes(found.parts), found.total_bytes
    mode.bits_per_weight = bits_per_weight(precision, shape)
    mode.kv_token_bytes, mode.kv_tokens = found.kv_token_bytes, found.kv_tokens
    mode.max_requests = requests_in(found.kv_tokens, question.context_tokens)
    asked_tokens = question.concurrency * context_blocks * BLOCK_TOKENS
    mode.needed_bytes = needed(found, asked_tokens, serving)
    mode.holds_all = mode.max_requests >= question.concurrency
    window = serving.max_context_tokens or config.max_context_tokens
    if question.context_tokens > window:
        mode.holds_all = False
        mode.verdict = f"no: a request ends at {window:,} tokens"
        return mode
    if mode.holds_all:
        mode.verdict = "yes"
    elif not mode.max_requests:
        mode.verdict = f"no: needs {megabytes(needed(found, context_blocks * BLOCK_TOKENS, serving))} for one"
    else:
        mode.verdict = f"holds {mode.max_requests:,}"
    requests = min(question.concurrency, mode.max_requests)
    bound = roofline(config, precision.name, found, device, requests, question.context_tokens)
    if requests:
        mode.tokens_per_s, mode.one_request_tokens_per_s = (
            bound.decode_tokens_per_s,
            bound.one_request_tokens_per_s,
        )
        mode.prefill_s, mode.bound_by = bound.prefill_s, bound.bound_by
    return mode


def needed(found: Estimate, kv_tokens: int, serving: Serving) -> int:
    """Memory with which a server leaves the cache so many tokens."""
    return found.fixed_bytes + int(kv_tokens * found.kv_token_bytes / serving.kv_memory_fraction)


def bits_per_weight(precision: Precision, shape: Shape) -> float:
    """Of the linears: what a mode's name promises, and what comes with it."""
    width = 4 if precision.name == "fp32" else 2
    groups = layer_groups(shape.config, 0)
    held = sum(sum(precision.sizes(name, parts, width).values()) for name, parts in groups.items())
    return 8 * held / weights(all_linears(shape.config))


def require_served(
    precision: Precision, kv_dtype: str, shape: Shape, device: Device, own_precision: str
) -> None:
    """PrecisionError where this device or this checkpoint cannot have the mode."""
    if own_precision and shape.quantization is not None and precision.name != own_precision.partition(":")[0]:
        raise PrecisionError(f"the checkpoint is quantized to `{own_precision}`, which leaves no other mode")
    if not device.has_e4m3 and "fp8" in (precision.name, kv_dtype):
        raise PrecisionError(f"`{device.name}` has no instructions for 8-bit floats")
    parts = all_linears(shape.config)
    if precision.name == "fp8" and device.is_gpu:
        odd = next(
            (p for p in parts if p.in_features % E4M3_MULTIPLE or p.out_features % E4M3_MULTIPLE), None
        )
        if odd:
            raise PrecisionError(
                f"precision `fp8` needs in and out features divisible by {E4M3_MULTIPLE} on a GPU; "
                f"`{odd.path}` has {odd.in_features} and {odd.out_features}"
            )


def choose(modes: list[PlannedMode], device: Device, question: Question) -> tuple[str, str]:
    """-> the mode to take, and the reason in words; no mode where none holds what was asked."""
    asked = f"{question.concurrency:,} requests of {question.context_tokens:,} tokens"
    holding = [mode for mode in modes if mode.holds_all]
    if not holding:
        closest = max(modes, key=lambda mode: (mode.max_requests, mode.bits_per_weight), default=None)
        if closest is None or not closest.max_requests:
            return "", f"No mode holds one request of {question.context_tokens:,} tokens on {device.name}."
        lighter = "" if closest.kv_dtype != "auto" else ", or halve the KV cache with `--kv-dtype int8`"
        return "", (
            f"No mode holds {asked} on {device.name}: `{closest.precision}` comes closest with "
            f"{closest.max_requests:,}. Ask for fewer or shorter ones{lighter}."
        )
    best = max(holding, key=lambda mode: mode.bits_per_weight)
    why = [
        f"Take `{best.precision}`: of the modes that hold {asked} on {device.name} it keeps the most bits a "
        f"weight ({best.bits_per_weight:.2f}), so it risks the least quality."
    ]
    larger = [mode for mode in modes if mode.bits_per_weight > best.bits_per_weight]
    if larger:
        told = ", ".join(f"`{mode.precision}` {mode.max_requests:,}" for mode in larger)
        why.append(f"What keeps more holds fewer: {told}.")
    faster = [mode for mode in holding if mode.tokens_per_s > FASTER * best.tokens_per_s > 0]
    if faster:
        told = ", ".join(
            f"`{mode.precision}` {mode.tokens_per_s / best.tokens_per_s:.1f}"
            for mode in sorted(faster, key=lambda mode: -mode.bits_per_weight)
        )
        why.append(f"Fewer bits could decode faster, times at most: {told}.")
    bounds = "Speeds are bounds, not measurements; " if best.tokens_per_s else ""
    why.append(f"{bounds}`halftone compare` measures speed and quality.")
    return best.precision, " ".join(why)


def to_json(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(plan)
    return found
