"""What calibrated quantizers know of the activations: second moments of each linear's input.

16-bit tensors + token windows --observe_layers()--> ObservedLayer by layer: its tensors, InputStatistics

With G = X^T X of an input X, the squared output error of any candidate weight W + D is tr(D G D^T): one
forward pass serves every candidate. One layer is on the device at a time, its weights, its moments and its
part of the KV cache, so a model is quantized by a device that it does not fit.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.batch import BLOCK_TOKENS, StepBatch
from service.model.checkpoint import TensorSource
from service.model.decoder import DecoderLayer, Step, plan_step
from service.model.one_layer import build_layer, one_layer_cache
from service.model.rotary import rotary_table
from service.precision import load_backend
from service.precision.base import Read

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BLOCKS = 6  # of a symmetric product: 21 of its 36 parts are computed


@dataclass(frozen=True)
class InputStatistics:
    """Moments of one input X [tokens, in_features]."""

    gram: Tensor  # float32 [in_features, in_features], X^T X / tokens
    mean_abs: Tensor  # float32 [in_features]

    @classmethod
    def of(cls, x: Tensor) -> "InputStatistics":
        wide = x.float()
        gram = wide.new_empty(wide.shape[1], wide.shape[1])
        for block in blocks(gram):  # one half is computed, the other is its mirror image
            part = wide[:, block].t() @ wide[:, block.start :]
            gram[block, block.start :] = part
            gram[block.start :, block] = part.t()
        return cls(gram.div_(wide.shape[0]), wide.abs().mean(0))

    def divided(self, scale: Tensor) -> "InputStatistics":
        """Moments of X / scale, `scale` [in_features]."""
        return InputStatistics(self.gram / scale / scale.unsqueeze(1), self.mean_abs / scale)


def blocks(gram: Tensor) -> list[slice]:
    """A symmetric matrix's columns in parts; what a part's rows hold from there on is to be computed."""
    size = -(-gram.shape[0] // BLOCKS)
    return [slice(start, min(start + size, gram.shape[0])) for start in range(0, gram.shape[0], size)]


def windows_batch(windows: list[list[int]], device: torch.device) -> tuple[StepBatch, int]:
    """Windows of any lengths as one prefill step -> (batch, KV blocks it needs)."""
    starts, tables = [0], []
    positions: list[int] = []
    slots: list[int] = []
    next_block = 1  # block 0 is never handed out
    for window in windows:
        num_blocks = -(-len(window) // BLOCK_TOKENS)
        starts.append(starts[-1] + len(window))
        positions += range(len(window))
        slots += range(next_block * BLOCK_TOKENS, next_block * BLOCK_TOKENS + len(window))
        tables.append(list(range(next_block, next_block + num_blocks)))
        next_block += num_blocks
    width = max(map(len, tables))
    batch = StepBatch(
        token_ids=torch.tensor([token for window in windows for token in window], device=device),
        positions=torch.tensor(positions, device=device),
        slots=torch.tensor(slots, device=device),
        query_starts=starts,
        context_lengths=[len(window) for window in windows],
        block_tables=torch.tensor(
            [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32, device=device
        ),
        num_decode=0,
        logit_rows=torch.zeros(0, dtype=torch.int64, device=device),
    )
    return batch, next_block


@dataclass(frozen=True)
class ObservedLayer:
    """One decoder layer and what came into it."""

    index: int
    tensors: dict[str, Tensor]  # by full name, on the device, as the source has them
    inputs: dict[str, InputStatistics]  # qkv_proj, o_proj, gate_up_proj, down_proj: moments of its input


def calibration_dtype(source: TensorSource, device: torch.device) -> torch.dtype:
    """The weights' own type; a CPU, slow in float16, has that as bfloat16."""
    is_slow = device.type == "cpu" and source.dtype == torch.float16
    return torch.bfloat16 if is_slow else source.dtype


def one_layer_step(source: TensorSource, windows: list[list[int]], device: torch.device) -> Step:
    """All windows in one prefill, over a cache of one layer, which each layer begins anew."""
    config = source.config
    batch, num_blocks = windows_batch(windows, device)
    dtype = calibration_dtype(source, device)
    kv = one_layer_cache(config, num_blocks, dtype, device)
    cos, sin = rotary_table(config.rope, config.head_dim, max(map(len, windows)), device)
    return plan_step(batch, kv, cos, sin)


def observe_layers(
    source: TensorSource, read: Read, windows: list[list[int]], device: torch.device
) -> Iterator[ObservedLayer]:
    """In the model's order; every layer sees what the layers before it make with their unquantized weights.

    `read`: from `source.reading(device)`. Nothing here holds a layer when the next one is asked for.
    """
    config, dtype = source.config, calibration_dtype(source, device)
    backend = load_backend(PRECISIONS[dtype])
    names: dict[int, list[str]] = {}
    for name in source.names:
        if name.startswith("model.layers."):
            names.setdefault(int(name.split(".")[2]), []).append(name)
    step = one_layer_step(source, windows, device)
    hidden = F.embedding(step.batch.token_ids, read("model.embed_tokens.weight").to(device, dtype))
    delta: Tensor | None = None
    for index in range(config.num_layers):
        tensors = {name: read(name).to(device) for name in names[index]}
        layer = build_layer(config, index, backend, tensors.__getitem__, device, dtype)
        hidden, delta, inputs = observe_layer(layer, hidden, delta, step)
        del layer
        yield ObservedLayer(index, tensors, inputs)
        del tensors, inputs  # before the next ones come


@torch.inference_mode()  # not around the generator: torch's wrapper holds what it yielded last
def observe_layer(
    layer: DecoderLayer, hidden: Tensor, delta: Tensor | None, step: Step
) -> tuple[Tensor, Tensor | None, dict[str, InputStatistics]]:
    """The residual stream before a layer -> that behind it, and by layer class the moments of inputs."""
    classes = {paths[0]: name for name, paths in layer.paths.items()}  # parts of a group see the same tensor
    inputs: dict[str, InputStatistics] = {}

    def observe(path: str, x: Tensor) -> None:
        if path in classes:
            inputs[classes[path]] = InputStatistics.of(x)

    hidden, delta = layer(hidden, delta, step, observe)
    return hidden, delta, inputs
