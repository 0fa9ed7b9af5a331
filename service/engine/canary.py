"""Before a precision takes another one's place: does it still say what the 16-bit weights say?

startup --model, config--> check_canary --> EngineInfo.canary, or CanaryError, and the front goes back

self_check holds one layer of each kind against its own weights. The canary hears all layers together, through
the kernels and the paged cache that serve: fixed tokens, most of them in one prefill, the last ones a step
each, and of each row the KL divergence from the reference over the whole vocabulary. The reference is the
checkpoint in 16 bits, a layer at a time on the device, so that it has room wherever the served one has.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from service import device as devices
from service.engine.likelihood import tokenize
from service.engine.sources import choose_backend, open_source
from service.engine.streamed import StreamedModel
from service.errors import DeviceError
from service.messages import EngineConfig
from service.model.batch import BLOCK_TOKENS, position_batch, sequence_batch
from service.model.checkpoint import TensorSource
from service.model.instance import ModelInstance, Progress
from service.precision import AUTO
from service.precision.options import AWQOptions
from service.quality.divergence import kl_divergence

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 64
DECODE_TOKENS = 16
# Nats a token. Three times and more what the demo model shows (docs/live-precision.md), which has 135 M
# parameters; larger models lose less. Behind a reader that swaps the nibbles of NF4 it shows 17.
BOUNDS = {
    "fp32": 0.02,
    "bf16": 0.02,
    "fp16": 0.02,
    "int8": 0.1,
    "fp8": 0.1,
    "nf4": 1.0,
    "awq": 0.5,
    "int3": 3.5,
}
THREE_BITS = "int3"  # whose bound awq has with three bits


class CanaryError(DeviceError):
    """The precision says something else than the weights that it was made from."""

    code = "canary_failed"


@torch.inference_mode()
def check_canary(model: ModelInstance, config: EngineConfig, progress: Progress) -> dict[str, float | str]:
    """-> what it measured and the bound, or why there is no reference. Raises CanaryError past the bound."""
    source = open_source(config, model.device)
    if reason := no_reference(model, source):
        logger.warning("no canary: %s", reason)
        return {"reference": f"none: {reason}"}
    backend = choose_backend(AUTO, source, model.device)
    token_ids = fixed_tokens(model, Path(config.tokenizer or source.path))
    num_passed = 0

    def advance(num_tokens: int) -> None:
        nonlocal num_passed
        num_passed += num_tokens
        progress("canary", num_passed, len(token_ids), "tokens")

    progress("canary", 0, len(token_ids), "tokens")
    wanted = reference_logits(StreamedModel(source, backend, model.device), token_ids, advance)
    prefill, decode = (
        float(kl_divergence(reference, served).mean())
        for reference, served in zip(wanted, served_logits(model, token_ids), strict=True)
    )
    devices.release_cached(model.device)  # the KV cache takes what is free
    bound = bound_of(model)
    logger.info("the canary is %.4f nats off in prefill, %.4f in decode, at most %g", prefill, decode, bound)
    if not max(prefill, decode) <= bound:  # NaN too
        raise CanaryError(
            f"precision `{model.backend.canonical}` is {max(prefill, decode):.2f} nats a token off "
            f"`{backend.canonical}` on {len(token_ids)} fixed tokens ({prefill:.2f} in prefill, {decode:.2f} "
            f"in decode); at most {bound:g} are accepted",
            hint="serve with another precision, and report what `halftone doctor` says",
        )
    return {
        "reference": backend.canonical,
        "tokens": len(token_ids),
        "prefill_kl_nats": prefill,
        "decode_kl_nats": decode,
        "bound_nats": bound,
    }


def no_reference(model: ModelInstance, source: TensorSource) -> str:
    """Why nothing in 16 bits can be compared with; empty: something can."""
    if source.quantization is not None:
        return "the checkpoint is quantized; its likelihood was checked instead (engine/likelihood)"
    if source.random_weights and model.backend.quantizer:
        return f"these random weights were drawn in `{model.backend.name}`"
    return ""


def bound_of(model: ModelInstance) -> float:
    """Nats a token."""
    options = model.backend.options
    has_three_bits = isinstance(options, AWQOptions) and options.bits == 3
    return BOUNDS[THREE_BITS if has_three_bits else model.backend.name]


def fixed_tokens(model: ModelInstance, tokenizer: Path) -> list[int]:
    """The beginning of a plain English text; without a tokenizer ids that are as good as any."""
    num_tokens = min(PREFILL_TOKENS + DECODE_TOKENS, model.decoder.cos.shape[0])
    if (tokenizer / "tokenizer.json").is_file() and len(token_ids := tokenize(tokenizer)) >= num_tokens:
        return token_ids[:num_tokens]
    return [(7919 * place + 1) % model.config.vocab_size for place in range(num_tokens)]


def reference_logits(
    reference: StreamedModel, token_ids: list[int], advance: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """[rows, vocab] of the tokens that are prefilled, and of those that are decoded."""
    num_prefill = len(token_ids) - DECODE_TOKENS
    passed = reference.through([token_ids], advance)
    prefill, decode = passed.logits(0, [(0, num_prefill), (num_prefill, len(token_ids))])
    return prefill, decode


def served_logits(model: ModelInstance, token_ids: list[int]) -> tuple[Tensor, Tensor]:
    """The same of the model that is to serve, through one cache."""
    num_prefill = len(token_ids) - DECODE_TOKENS
    blocks = list(range(1, -(-len(token_ids) // BLOCK_TOKENS) + 1))  # block 0 is nobody's
    kv = model.new_kv(len(blocks) + 1)
    batch = sequence_batch(token_ids[:num_prefill], blocks, model.device)
    prefill = model.forward(replace(batch, logit_rows=batch.positions), kv)
    decode = [
        model.forward(position_batch([token_ids], [blocks], position, model.device), kv)
        for position in range(num_prefill, len(token_ids))
    ]
    return prefill, torch.cat(decode)
