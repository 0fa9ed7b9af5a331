"""Before a precision takes another one's place: does it still say what the 16-bit weights say?

startup --model, config--> check_canary --> EngineInfo.canary, or CanaryError, and the front goes back

self_check holds one layer of each kind against its own weights. The canary hears all layers together, through
the kernels and the paged cache that serve: fixed tokens, most of them in one prefill, the last ones a step
each, and of each row the KL divergence from the reference over the whole vocabulary. It also hears each layer
alone: behind what the reference has before that layer, what does it add? One broken layer of many moves the
end too little to be told from a rough precision. The reference is the checkpoint in 16 bits, a layer at a
time on the device, so that it has room wherever the served one has.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from service import device as devices
from service.engine.likelihood import tokenize
from service.engine.sources import choose_backend, open_source
from service.engine.streamed import Beside, Stream, StreamedModel
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


@dataclass(frozen=True)
class Bound:
    """Most that is accepted."""

    nats: float  # a token, at the end
    layer: float  # relative error of what one layer adds


# Nats: three times and more what the demo model shows (docs/live-precision.md), which has 135 M parameters;
# larger models lose less. Of a layer twice what it shows, 1.6 times with three bits: a layer that adds
# something else is 1.4 off. NF4's nibbles swapped are worth 17 nats; in one linear of a layer, 0.84 and more.
BOUNDS = {
    "fp32": Bound(0.02, 0.2),
    "bf16": Bound(0.02, 0.2),
    "fp16": Bound(0.02, 0.2),
    "int8": Bound(0.1, 0.5),
    "fp8": Bound(0.1, 0.5),
    "nf4": Bound(1.0, 0.8),
    "awq": Bound(0.5, 0.8),
    "int3": Bound(3.5, 1.2),
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
    layers = LayerErrors(model, token_ids)
    wanted = reference_logits(StreamedModel(source, backend, model.device), token_ids, advance, layers)
    prefill, decode = (
        float(kl_divergence(reference, served).mean())
        for reference, served in zip(wanted, served_logits(model, token_ids), strict=True)
    )
    devices.release_cached(model.device)  # the KV cache takes what is free
    bound = bound_of(model)
    layer, error = layers.worst
    logger.info(
        "the canary is %.4f nats off in prefill, %.4f in decode, at most %g; layer %d by %.2f, at most %g",
        *(prefill, decode, bound.nats, layer, error, bound.layer),
    )
    if not (max(prefill, decode) <= bound.nats and error <= bound.layer):  # NaN too
        raise CanaryError(
            f"precision `{model.backend.canonical}` is {max(prefill, decode):.2f} nats a token off "
            f"`{backend.canonical}` on {len(token_ids)} fixed tokens ({prefill:.2f} in prefill, {decode:.2f} "
            f"in decode), at most {bound.nats:g} are accepted; what layer {layer} adds is {error:.0%} off, "
            f"at most {bound.layer:.0%}",
            hint="serve with another precision, and report what `halftone doctor` says",
        )
    return {
        "reference": backend.canonical,
        "tokens": len(token_ids),
        "prefill_kl_nats": prefill,
        "decode_kl_nats": decode,
        "bound_nats": bound.nats,
        "layer_error": error,
        "layer": layer,
        "bound_layer_error": bound.layer,
    }


def no_reference(model: ModelInstance, source: TensorSource) -> str:
    """Why nothing in 16 bits can be compared with; empty: something can."""
    if source.quantization is not None:
        return "the checkpoint is quantized; its likelihood was checked instead (engine/likelihood)"
    if source.random_weights and model.backend.quantizer:
        return f"these random weights were drawn in `{model.backend.name}`"
    return ""


class LayerErrors:
    """How far what each served layer adds is from what the reference's does, both behind the same stream."""

    def __init__(self, model: ModelInstance, token_ids: list[int]) -> None:
        blocks = list(range(1, -(-len(token_ids) // BLOCK_TOKENS) + 1))  # block 0 is nobody's
        batch = sequence_batch(token_ids, blocks, model.device)
        self._model = model
        self._step = model.decoder.prepare(batch, model.new_kv(len(blocks) + 1))
        self._errors: list[Tensor] = []

    def __call__(self, index: int, before: Stream, behind: Stream) -> None:
        """Of the two sums that layer `index` adds, attention's and the MLP's, the worse counts."""
        model, (stream, into) = self._model, before
        hidden, delta = model.layers()[index](
            stream.to(model.device, model.dtype),
            None if into is None else into.to(model.device, model.dtype),
            self._step,
        )
        assert delta is not None
        assert behind[1] is not None
        start = stream.float() if into is None else stream.float() + into.float()
        attention = relative_error(hidden.cpu().float() - start, behind[0].float() - start)
        mlp = relative_error(delta.cpu().float(), behind[1].float())
        self._errors.append(torch.stack((attention, mlp)).max())

    @property
    def worst(self) -> tuple[int, float]:
        """Number of the layer, and its error; none is worse than NaN."""
        errors = torch.stack(self._errors)
        index = int(errors.argmax())
        return index, float(errors[index])


def relative_error(got: Tensor, want: Tensor) -> Tensor:
    """Of the middle row: a model's first token, and few others, may be larger than all rows together."""
    size = want.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return ((got - want).norm(dim=1) / size).median()


def bound_of(model: ModelInstance) -> Bound:
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
    reference: StreamedModel, token_ids: list[int], advance: Callable[[int], None], beside: Beside
) -> tuple[Tensor, Tensor]:
    """[rows, vocab] of the tokens that are prefilled, and of those that are decoded."""
    num_prefill = len(token_ids) - DECODE_TOKENS
    passed = reference.through([token_ids], advance, beside)
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
