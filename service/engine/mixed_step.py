"""A step with parts of prompts in it: what the host knows of it, and the step as a function of tensors alone.

runner --chunks--> MixedInputs --batch--> decoder, kernel by kernel
                        '--MixedStep.fill--> captured MixedStep --> logits

Such a step is hundreds of kernels, and to launch them takes the host longer than many a step takes a GPU.
So it is captured as decode steps are. Its shape is rounded up; what is beyond its own rows is padding: token
0 at position 0, whose K and V go into block 0 and whom no tile of attention is of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.decode_step import Model
from service.engine.scheduler import Chunk
from service.engine.state import LAST_TOKEN, DeviceState, Ints
from service.kernels.kv_codes import is_coded
from service.kernels.paged_attention import COPIED_TOKENS, SHORT_PROMPT_TOKENS, PromptTiles
from service.model.batch import BLOCK_TOKENS, PagedKV, StepBatch

MOST_PROMPTS = 32  # with a part in a captured step; steps of more are of short prompts
MOST_ENDS = 16  # of prompts, which then have logits as rows that decode have
MOST_ROWS = 2048  # behind more the device is slower than the host anyhow
# A product's tiles have 64 to 256 rows: others would save nothing, and behind 384 cuBLAS takes as long for
# 448 as for 768 (docs/experiments.md, section 5). From so many rows on, steps of:
ROW_STEPS = ((1024, 512), (768, 128), (512, 64), (384, 128), (0, 64))


class MixedShape(NamedTuple):
    """What is fixed when a step is captured."""

    num_rows: int
    num_decode: int
    num_logits: int  # fewer than rows: the others' part of the last layer is left out
    is_long: bool  # some prompt's context is; attention has other tiles then

    @property
    def num_sequences(self) -> int:
        """The last is nobody's: tiles of padding are of it."""
        return self.num_decode + MOST_PROMPTS + 1


def decode_sizes(max_requests: int) -> list[int]:
    """0, 16, 64, 256, ...: far apart, for attention of a row that is no decode's ends at once."""
    sizes = [0]
    size = 16
    while size < max_requests:
        sizes.append(size)
        size *= 4
    return [*sizes, max_requests]


def row_sizes(most: int) -> list[int]:
    """64, 128, ... up to `most` or more."""
    sizes = [ROW_STEPS[-1][1]]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + next(step for least, step in ROW_STEPS if sizes[-1] >= least))
    return sizes


@dataclass(frozen=True)
class MixedInputs:
    """A step of T tokens of S sequences, those that decode first."""

    token_ids: Ints  # [T]; of a row that decodes 0: the device knows it
    positions: Ints  # [T]
    slots: Ints  # [T]
    rows: Ints  # [S], of the state
    lengths: Ints  # [S]
    starts: Ints  # [S + 1]
    logit_rows: Ints  # [R]
    num_decode: int

    @classmethod
    def of(
        cls,
        chunks: Sequence[Chunk],
        rows: Ints,
        stops: Ints,
        num_decode: int,
        logit_rows: list[int],
        state: DeviceState,
    ) -> "MixedInputs":
        counts = np.array([chunk.num_tokens for chunk in chunks], np.int64)
        starts = np.append(0, counts.cumsum())
        positions = np.repeat(stops - starts[1:], counts) + np.arange(starts[-1])
        token_ids = [0] * num_decode
        for chunk in chunks[num_decode:]:
            token_ids += chunk.request.tokens[chunk.start : chunk.stop]
        return cls(
            token_ids=np.array(token_ids, np.int64),
            positions=positions,
            slots=state.slots(np.repeat(rows, counts), positions),
            rows=rows,
            lengths=stops,
            starts=starts,
            logit_rows=np.array(logit_rows, np.int64),
            num_decode=num_decode,
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompts(self) -> int:
        return len(self.rows) - self.num_decode

    def batch(self, state: DeviceState) -> StepBatch:
        """On the device."""
        columns = (
            self.token_ids, self.positions, self.slots, self.rows, self.lengths, self.starts, self.logit_rows,
        )  # fmt: skip
        packed = devices.upload(np.concatenate(columns), state.device)
        tokens, positions, slots, rows, lengths, starts, logit_rows = packed.split(
            [len(column) for column in columns]
        )
        if self.num_decode:
            tokens[: self.num_decode] = last_tokens(state, rows[: self.num_decode])
        return StepBatch(
            token_ids=tokens,
            positions=positions,
            slots=slots,
            query_starts=self.starts.tolist(),
            context_lengths=self.lengths.tolist(),
            block_tables=state.tables_for(int(self.lengths.max())).index_select(0, rows),
            num_decode=self.num_decode,
            logit_rows=logit_rows,
            lengths=lengths.to(torch.int32),
            starts=starts.to(torch.int32),
        )


def last_tokens(state: DeviceState, rows: Tensor) -> Tensor:
    """int64 [n] -> int32 [n], which the steps before have drawn."""
    return state.fields[:, LAST_TOKEN].index_select(0, rows)


class MixedStep:
    """Bound to one model, one KV cache, one state and one shape."""

    def __init__(self, shape: MixedShape, model: Model, kv: PagedKV, state: DeviceState) -> None:
        assert shape.num_logits < shape.num_rows
        self.shape = shape
        self._model = model
        self._kv = kv
        self._state = state
        sequences = shape.num_sequences
        counts = (
            *[shape.num_rows] * 3, sequences, *[shape.num_logits] * 2, sequences, sequences + 1,
        )  # fmt: skip
        # each begins at a multiple of 16 bytes, for which kernels are compiled
        begins = [0, *accumulate(count + count % 2 for count in counts)]
        self._places = [slice(begin, begin + count) for begin, count in zip(begins, counts, strict=False)]
        self._words = torch.zeros(begins[-1], dtype=torch.int64, device=state.device)
        self._tiles = PromptTiles(
            num_queries=shape.num_rows,
            num_prompts=MOST_PROMPTS,
            nobody=sequences - 1,
            is_long=shape.is_long,
            device=state.device,
            num_pages=COPIED_TOKENS // BLOCK_TOKENS + MOST_PROMPTS if is_coded(kv.keys[0].dtype) else 0,
        )
        self.clear()

    def clear(self) -> None:
        """The next run is of padding alone."""
        none = np.empty(0, np.int64)
        self.fill(MixedInputs(none, none, none, none, none, np.zeros(1, np.int64), none, 0))

    def fill(self, inputs: MixedInputs) -> None:
        """What the next run computes, behind what the device was given before."""
        decode, prompts = inputs.num_decode, inputs.num_prompts
        assert decode <= self.shape.num_decode
        assert prompts <= MOST_PROMPTS
        host = np.zeros(len(self._words), np.int64)
        tokens, positions, slots, rows, logit_rows, logit_slots, lengths, starts = (
            host[place] for place in self._places
        )
        count = inputs.num_tokens
        tokens[:count], positions[:count], slots[:count] = inputs.token_ids, inputs.positions, inputs.slots
        wanted = inputs.logit_rows
        logit_rows[: len(wanted)], logit_slots[: len(wanted)] = wanted, inputs.slots[wanted]
        rows[:] = self._state.padding
        first = self.shape.num_decode  # of the prompts' sequences
        for places, source in ((rows, inputs.rows), (lengths, inputs.lengths)):
            places[:decode] = source[:decode]
            places[first : first + prompts] = source[decode:]
        starts[first:] = count
        starts[first : first + prompts] = inputs.starts[decode:-1]
        devices.upload_into(host, self._words)
        self._tiles.fill(first, np.diff(inputs.starts[decode:]).tolist(), inputs.lengths[decode:].tolist())

    def __call__(self) -> Tensor:
        """-> [num_logits, vocab], any float type; K and V of all tokens are in the cache."""
        state, num_decode = self._state, self.shape.num_decode
        tokens, positions, slots, rows, logit_rows, logit_slots = (
            self._words[place] for place in self._places[:-2]
        )
        narrow = self._words.to(torch.int32)
        lengths, starts = (narrow[place] for place in self._places[-2:])
        if num_decode:
            decoding = rows[:num_decode]
            known = torch.where(decoding == state.padding, tokens[:num_decode], last_tokens(state, decoding))
            tokens = torch.cat((known, tokens[num_decode:]))
        batch = StepBatch(
            token_ids=tokens,
            positions=positions,
            slots=slots,
            query_starts=[],
            context_lengths=[],
            block_tables=state.tables.index_select(0, rows),
            num_decode=num_decode,
            logit_rows=logit_rows,
            lengths=lengths,
            starts=starts,
            logit_slots=logit_slots,
            tiles=self._tiles,
        )
        return self._model.forward(batch, self._kv)


class MixedSteps:
    """Which shape serves a step, within an engine's limits, and what is captured of it."""

    def __init__(
        self, model: Model, kv: PagedKV, state: DeviceState, max_step_tokens: int, max_requests: int
    ) -> None:
        self._model = model
        self._kv = kv
        self._state = state
        self._max_requests = max_requests
        self._decode_sizes = decode_sizes(max_requests)
        self._row_sizes = row_sizes(max(min(max_step_tokens, MOST_ROWS), max_requests + 1))

    @property
    def largest(self) -> MixedShape:
        return self._shape(self._row_sizes[-1], self._decode_sizes[-1], is_long=False)

    def usual(self) -> list[MixedShape]:
        """All but those of long contexts, the largest first."""
        shapes = {
            self._shape(num_rows, num_decode, is_long=False)
            for num_rows in self._row_sizes
            for num_decode in self._decode_sizes
        }
        return sorted(shapes, reverse=True)

    def make(self, shape: MixedShape) -> MixedStep:
        return MixedStep(shape, self._model, self._kv, self._state)

    def shape_of(self, inputs: MixedInputs) -> MixedShape | None:
        """None for a step that is too large to be captured."""
        lengths = inputs.lengths[inputs.num_decode :]
        if inputs.num_tokens > self._row_sizes[-1] or len(lengths) > MOST_PROMPTS:
            return None
        if is_coded(self._kv.keys[0].dtype) and lengths.sum() > COPIED_TOKENS:
            return None
        num_decode = next(size for size in self._decode_sizes if size >= inputs.num_decode)
        shape = self._shape(inputs.num_tokens, num_decode, is_long=bool(lengths.max() > SHORT_PROMPT_TOKENS))
        return shape if len(inputs.logit_rows) <= shape.num_logits else None

    def _shape(self, num_tokens: int, num_decode: int, *, is_long: bool) -> MixedShape:
        num_logits = min(num_decode + MOST_ENDS, self._max_requests)
        least = max(num_tokens, num_logits + 1)
        num_rows = next(size for size in self._row_sizes if size >= least)
        return MixedShape(num_rows, num_decode, num_logits, is_long)
