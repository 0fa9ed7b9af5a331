"""A precision of which one layer at a time is on the device: how a reference is asked that may not fit there.

evaluate --sequences--> StreamedModel.through --layers in turn over all sequences--> Passed --logits--> KL

Layers are built by the backend that would serve them, run over every sequence by the kernels that would serve
them, and dropped, so the numbers are those of the whole model, bit for bit. The residual streams wait in host
memory meanwhile, and of the KV cache one layer is enough, because each sequence is one prefill. Beside the
served model the device holds one layer, or the embedding, or lm_head.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from service import device as devices
from service.engine.shortage import told_shortage
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.dense_linear import pack_weight
from service.model.batch import BLOCK_TOKENS, sequence_batch
from service.model.checkpoint import TensorSource
from service.model.decoder import DecoderLayer, Step, plan_step
from service.model.head import Embedding, FullHead
from service.model.instance import accepted
from service.model.one_layer import build_layer, one_layer_cache
from service.model.rotary import rotary_table
from service.precision.base import Backend, Read

Stream = tuple[Tensor, Tensor | None]  # the residual stream and what is to be added to it, [T, hidden] each
Beside = Callable[[int, Stream, Stream], None]  # (a layer's number, a sequence's stream before it, behind it)

LOGIT_ROWS = 128  # rows of logits at once: float64 copies of a large vocabulary are big
HOST = torch.device("cpu")


class StreamedModel:
    """One precision of a checkpoint, with a 16-bit head and a cache of its activations' type."""

    def __init__(self, source: TensorSource, backend: Backend, device: torch.device) -> None:
        """Raises PrecisionError for a checkpoint that this backend does not read."""
        self.source, self.backend, self.device = source, accepted(backend, source), device
        self.dtype = backend.activation_dtype(device, source.dtype)

    @torch.inference_mode()
    def through(
        self, sequences: Sequence[list[int]], advance: Callable[[int], None], beside: Beside | None = None
    ) -> "Passed":
        """Every sequence through all layers; `advance` is given tokens, in parts that add up to all.

        `beside` is called behind each layer and sequence, while the layer is on the device. Raises
        DeviceError where not even one layer has room.
        """
        config, device = self.source.config, self.device
        what = f"one layer at a time of the reference `{self.backend.canonical}`"
        with told_shortage(device, what), self.source.reading(device) as read:
            streams = self._embedded(read, sequences)
            steps = self._steps(sequences)
            shares = [len(sequence) for sequence in sequences]
            for index in range(config.num_layers):
                layer = build_layer(config, index, self.backend, read, device, self.dtype)
                for number, step in enumerate(steps):
                    before = streams[number]
                    streams[number] = self._one(layer, before, step)
                    if beside:
                        beside(index, before, streams[number])
                    done = shares[number] * (index + 1) // config.num_layers
                    advance(done - shares[number] * index // config.num_layers)
                del layer
                devices.release_cached(device)
            final_norm = read("model.norm.weight").to(device, self.dtype, copy=True)
            return Passed(streams, final_norm, config.norm_eps, self._head(read), device)

    def _embedded(self, read: Read, sequences: Sequence[list[int]]) -> list[Stream]:
        weight = read("model.embed_tokens.weight").to(self.device, self.dtype)
        return [
            (F.embedding(torch.tensor(sequence, device=self.device), weight).to(HOST), None)
            for sequence in sequences
        ]

    def _steps(self, sequences: Sequence[list[int]]) -> list[Step]:
        """All of them through the same blocks of one layer's cache: each layer begins anew."""
        config, longest = self.source.config, max(map(len, sequences))
        num_blocks = -(-longest // BLOCK_TOKENS)
        kv = one_layer_cache(config, num_blocks + 1, self.dtype, self.device)
        cos, sin = rotary_table(config.rope, config.head_dim, longest, self.device)
        blocks = list(range(1, num_blocks + 1))
        return [
            plan_step(sequence_batch(sequence, blocks, self.device), kv, cos, sin) for sequence in sequences
        ]

    def _one(self, layer: DecoderLayer, stream: Stream, step: Step) -> Stream:
        hidden, delta = stream
        hidden, delta = layer(hidden.to(self.device), None if delta is None else delta.to(self.device), step)
        return hidden.to(HOST), None if delta is None else delta.to(HOST)

    def _head(self, read: Read) -> FullHead:
        """As model/decoder builds it."""
        tied = self.source.config.tied_head
        weight = read("model.embed_tokens.weight" if tied else "lm_head.weight")
        weight = weight.to(self.device, self.dtype, copy=True)
        return FullHead(Embedding(weight, is_head=True).weight if tied else pack_weight(weight))


class Passed:
    """Sequences behind the last layer, and the head that makes logits of them."""

    def __init__(
        self, streams: list[Stream], final_norm: Tensor, norm_eps: float, head: FullHead, device: torch.device
    ) -> None:
        self._streams = streams
        self._final_norm, self._norm_eps = final_norm, norm_eps
        self._head, self._device = head, device

    def logits(self, number: int, rows: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Of sequence `number`, for each (first, last + 1) of `rows`: [rows, vocab], any float type."""
        hidden, delta = self._streams[number]
        for start, stop in rows:
            part = hidden[start:stop].to(self._device)
            added = None if delta is None else delta[start:stop].to(self._device)
            yield self._head(add_rms_norm(part, added, self._final_norm, self._norm_eps)[1])


def row_slices(first: int, stop: int) -> list[tuple[int, int]]:
    """Rows from `first` to `stop` - 1, as many at once as logits may be held of."""
    return list(pairwise([*range(first, stop, LOGIT_ROWS), stop])) if first < stop else []


def in_groups(sequences: Sequence[list[int]], max_tokens: int) -> list[range]:
    """Neighbours together until a group would hold more tokens; each sequence is in one of them."""
    groups: list[range] = []
    start = num_tokens = 0
    for number, sequence in enumerate(sequences):
        if number > start and num_tokens + len(sequence) > max_tokens:
            groups.append(range(start, number))
            start, num_tokens = number, 0
        num_tokens += len(sequence)
    return [*groups, range(start, len(sequences))]
