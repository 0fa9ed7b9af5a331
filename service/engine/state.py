"""What the device knows of each running request: its blocks, its length, its last token, how it samples.

runner --seat, extend, resume, select--> DeviceState --flush: one copy of what changed--> the steps' tensors

Each running request has a row, and one more row is for padding. Everything lies in one int32 tensor, so that
one copy serves whatever changed between two steps, and a steady decode needs none. Length and last token are
written by the steps themselves: a step may be launched before the host knows what the one before it drew.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from service import device as devices
from service.messages import Sampling
from service.model.batch import BLOCK_TOKENS

Ints = npt.NDArray[np.int64]

# int32 words of a row; the last three columns are 64 bits wide and are counted in pairs
LENGTH, LAST_TOKEN = 0, 1  # tokens in the cache, and the one to compute next
TOP_K, SAMPLE_INDEX, TEMPERATURE = 2, 3, 4
SEED, TOP_P, MIN_P = 3, 4, 5
NUM_WORDS = 12


class DeviceState:
    """Rows 0 to `max_requests` - 1 are requests', row `padding` is nobody's: its blocks are block 0."""

    def __init__(self, max_requests: int, max_context_tokens: int, device: torch.device) -> None:
        self.device = device
        self.padding = max_requests
        self.num_uploads = 0
        num_rows, num_blocks = max_requests + 1, -(-max_context_tokens // BLOCK_TOKENS)
        ends = np.cumsum([num_rows * NUM_WORDS, num_rows * num_blocks, num_rows])
        self._tables_start, self._rows_start = int(ends[0]), int(ends[1])
        self._host = np.zeros(ends[2], np.int32)
        fields, tables, self._rows = np.split(self._host, ends[:2])
        self._fields = fields.reshape(num_rows, NUM_WORDS)
        self._wide = self._fields.view(np.int64)
        self._tables = tables.reshape(num_rows, num_blocks)
        self._changed: list[Ints] = []
        self._words = torch.zeros(len(self._host), dtype=torch.int32, device=device)
        # int32 [rows, words], int32 [rows, blocks of the longest request], int32 [rows]
        self.fields = self._words[: ends[0]].view(num_rows, NUM_WORDS)
        self.tables = self._words[ends[0] : ends[1]].view(num_rows, num_blocks)
        self.rows = self._words[ends[1] :]  # of the decode step, in its order

    @property
    def bytes(self) -> int:
        """On the device."""
        return self._words.numel() * self._words.element_size()

    def seat(self, row: int, sampling: Sampling) -> None:
        """A request takes this row."""
        fields, wide = self._fields[row], self._wide[row]
        fields[TOP_K], fields[SAMPLE_INDEX] = sampling.top_k, sampling.sample_index
        fields[TEMPERATURE : TEMPERATURE + 1].view(np.float32)[0] = sampling.temperature
        wide[SEED : SEED + 1].view(np.uint64)[0] = sampling.seed & 0xFFFFFFFFFFFFFFFF
        wide[TOP_P : MIN_P + 1].view(np.float64)[:] = sampling.top_p, sampling.min_p
        self._change(row * NUM_WORDS + TOP_K, NUM_WORDS - TOP_K)

    def extend(self, row: int, first: int, blocks: list[int]) -> None:
        """The row's blocks from number `first` on."""
        self._tables[row, first : first + len(blocks)] = blocks
        self._change(self._tables_start + row * self._tables.shape[1] + first, len(blocks))

    def resume(self, row: int, length: int, token_id: int) -> None:
        """What the next decode step of this row computes, where no step has left it on the device."""
        self._fields[row, LENGTH], self._fields[row, LAST_TOKEN] = length, token_id
        self._change(row * NUM_WORDS, 2)

    def select(self, rows: Ints, num_places: int) -> None:
        """The rows of the next decode step, padded to `num_places`."""
        wanted = np.full(num_places, self.padding, np.int32)
        wanted[: len(rows)] = rows
        moved = np.flatnonzero(self._rows[:num_places] != wanted)
        if len(moved):
            self._rows[moved] = wanted[moved]
            self._changed.append(moved + self._rows_start)

    def tables_for(self, length: int) -> Tensor:
        """int32 [rows, blocks that `length` needs], or more.

        On a GPU as wide as ever: kernels are built for a table's width, and none shall be while others wait.
        """
        if devices.runs_behind(self.device):
            return self.tables
        return self.tables[:, : -(-length // BLOCK_TOKENS)]

    def slots(self, rows: Ints, positions: Ints) -> Ints:
        """int64 [n] each -> where K and V of these tokens are written."""
        blocks = self._tables[rows, positions // BLOCK_TOKENS]
        slots: Ints = blocks * np.int64(BLOCK_TOKENS) + positions % BLOCK_TOKENS
        return slots

    def flush(self) -> None:
        """Brings the device up to date, behind all earlier steps: a row may have a new tenant while a step
        that still has the old one in it is on its way."""
        if not self._changed:
            return
        places = np.concatenate(self._changed)
        self._changed.clear()
        pairs = devices.upload(np.stack((places.astype(np.int32), self._host[places])), self.device)
        self._words.index_put_((pairs[0].long(),), pairs[1])
        self.num_uploads += 1

    def advance(self, rows: Tensor, lengths: Tensor, token_ids: Tensor) -> None:
        """After a step, int [n] each: tokens in the cache now, and what was drawn behind them."""
        # padding stays at length 0; a broken row's id must not be looked up before the host ends its request
        lengths = torch.where(rows == self.padding, 0, lengths)
        written = torch.stack((lengths, token_ids.clamp(min=0)), 1).to(torch.int32)
        self.fields[:, : LAST_TOKEN + 1].index_copy_(0, rows.long(), written)

    def _change(self, start: int, count: int) -> None:
        self._changed.append(np.arange(start, start + count))
