"""What calibrated quantizers know of the activations: second moments of each linear's input.

16-bit model + token windows --observe_layers()--> layer by layer, {layer class: InputStatistics}

With G = X^T X of an input X, the squared output error of any candidate weight W + D is tr(D G D^T): one
forward pass serves every candidate, and only one layer's moments are alive at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from service.model.batch import BLOCK_TOKENS, StepBatch
from service.model.decoder import DecoderLayer
from service.model.instance import ModelInstance
from service.model.layout import layer_groups

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


@torch.inference_mode()
def observe_layers(
    instance: ModelInstance, windows: list[list[int]]
) -> Iterator[tuple[int, dict[str, InputStatistics]]]:
    """-> (layer, {qkv_proj, o_proj, gate_up_proj, down_proj: moments of its input}), in the model's order.

    Every layer sees what the layers before it make with their unquantized weights.
    """
    batch, num_blocks = windows_batch(windows, instance.device)
    decoder = instance.decoder
    step = decoder.prepare(batch, instance.new_kv(num_blocks))
    hidden, delta = decoder.embed(batch.token_ids), None
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, DecoderLayer), "the decoder is made of nothing else"
        groups = layer_groups(instance.config, index)
        first_part = {parts[0].path: name for name, parts in groups.items()}
        seen: dict[str, InputStatistics] = {}

        def observe(path: str, x: Tensor, names: dict[str, str] = first_part) -> None:
            if path in names:
                seen[names[path]] = InputStatistics.of(x)  # noqa: B023  (called within this iteration)

        hidden, delta = layer(hidden, delta, step, observe)
        yield index, seen
