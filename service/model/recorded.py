"""A decode of few rows on a CPU: all layers' calls into the native library, recorded and replayed as one.

decoder --hidden, batch--> Recordings.decode --> x for lm_head, or None: then the decoder goes layer by layer

There is a recording for each number of rows and width of block tables, made by the step that first has them.
Two arenas take turns with the layers, because a layer reads what the one before it left.
"""

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from service.kernels import native
from service.kernels.native.recording import Arena, Recorder, Recording, UnrecordableError, record
from service.model.batch import PagedKV, StepBatch

logger = logging.getLogger(__name__)

MOST_ROWS = 16  # behind more, Python between the calls is a small part of a step
LEAST_BLOCKS = 32  # of a table; wider ones are powers of two

Layers = Callable[[Tensor, StepBatch, PagedKV, Callable[[int], None]], Tensor]


@dataclass(frozen=True)
class RecordedDecode:
    """What it reads: written before a replay. What it gives: overwritten by the next."""

    hidden: Tensor  # [T, hidden]
    batch: StepBatch  # of tensors alone
    x: Tensor  # [T, hidden], normed for lm_head
    recording: Recording

    def __call__(self, hidden: Tensor, batch: StepBatch, lengths: Tensor) -> Tensor:
        self.hidden.copy_(hidden)
        fill(self.batch, batch, lengths)
        self.recording.replay()
        return self.x


class Recordings:
    """Of one decoder."""

    def __init__(self) -> None:
        self._kv: Callable[[], PagedKV | None] = lambda: None  # it may end before the decoder does
        self._recorded: dict[tuple[int, int], RecordedDecode] = {}
        self._is_recordable = True
        self._arenas = Arena(), Arena()

    @property
    def num_bytes(self) -> int:
        """Of the memory that recorded steps work in."""
        return sum(arena.num_bytes for arena in self._arenas)

    def decode(self, layers: Layers, hidden: Tensor, batch: StepBatch, kv: PagedKV) -> Tensor | None:
        """[T, hidden] -> [T, hidden] normed for lm_head, valid until the next call.

        None where it is no decode that can be recorded. `layers` runs them all, the same ones each time, and
        says before each which it is.
        """
        num_rows, library = len(hidden), native.load()
        if (
            not self._is_recordable
            or not hidden.is_cpu
            or library is None
            or not batch.num_decode == len(batch.logit_rows) == num_rows <= MOST_ROWS
        ):
            return None
        if kv is not self._kv():
            self._kv, self._recorded = weakref.ref(kv), {}
        lengths = batch.lengths
        if lengths is None:
            lengths = torch.tensor(batch.context_lengths, dtype=torch.int32)
        num_blocks = max(LEAST_BLOCKS, 1 << (batch.block_tables.shape[1] - 1).bit_length())
        recorded = self._recorded.get((num_rows, num_blocks))
        if recorded:
            return recorded(hidden, batch, lengths)
        return self._record(library, layers, hidden, batch, lengths, num_blocks, kv)

    def _record(
        self,
        library: native.Library,
        layers: Layers,
        hidden: Tensor,
        batch: StepBatch,
        lengths: Tensor,
        num_blocks: int,
        kv: PagedKV,
    ) -> Tensor | None:
        """Computes the step, and may do so again."""
        own_hidden, own_batch = hidden.clone(), empty_batch(len(hidden), num_blocks)
        fill(own_batch, batch, lengths)

        def run(recorder: Recorder) -> Tensor:
            def before_layer(number: int) -> None:
                recorder.arena = self._arenas[number % 2]
                recorder.arena.restart()

            return layers(own_hidden, own_batch, kv, before_layer)

        try:
            x, recording = record(library, self._arenas[0], run)
        except UnrecordableError as error:
            self._is_recordable = False
            logger.info("decode steps are not recorded: %s is computed outside of the native kernels", error)
            return None
        self._recorded[len(hidden), num_blocks] = RecordedDecode(own_hidden, own_batch, x, recording)
        return x


def empty_batch(num_rows: int, num_blocks: int) -> StepBatch:
    """A decode known by its tensors alone, whose contents are still to come."""
    token_ids, positions, slots = torch.zeros(3, num_rows, dtype=torch.int64)
    return StepBatch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        query_starts=list(range(num_rows + 1)),
        context_lengths=[],
        block_tables=torch.zeros(num_rows, num_blocks, dtype=torch.int32),
        num_decode=num_rows,
        logit_rows=torch.arange(num_rows),
        lengths=torch.zeros(num_rows, dtype=torch.int32),
        starts=torch.arange(num_rows + 1, dtype=torch.int32),
    )


def fill(own: StepBatch, batch: StepBatch, lengths: Tensor) -> None:
    """What the layers read of a decode; blocks behind a row's length are not read."""
    own.positions.copy_(batch.positions)
    own.slots.copy_(batch.slots)
    assert own.lengths is not None
    own.lengths.copy_(lengths)
    own.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)
