"""Decode steps captured once for each batch size: to replay one costs the host a single call.

runner --step, forward--> Graph --replay--> token ids, logits

Sizes grow by eight; what is left of a size is padding. All graphs share one pool of memory, which is safe
because only one of them runs at a time, and because what a step gives is copied away before the next begins.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.decode_step import DecodeStep
from service.engine.sampler import Variant
from service.engine.state import DeviceState
from service.errors import DeviceError

# the full one also serves rows that only have temperatures: the kernels of the filters end at once for them,
# predicted to cost 5 to 14 us a step, where a third graph for each size would cost every start a second
CAPTURED: tuple[Variant, ...] = ("full", "greedy")


def batch_sizes(max_requests: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and `max_requests`."""
    sizes = {size for size in (1, 2, 4, *range(8, max_requests, 8)) if size < max_requests}
    return sorted(sizes | {max_requests})


@dataclass(frozen=True, slots=True)
class Graph:
    num_rows: int
    captured: devices.Captured

    def replay(self) -> Tensor:
        """-> [num_rows, ...], overwritten by the next replay."""
        return self.captured.replay()


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """What all graphs together hold: bytes."""

    buffer_bytes: int = 0  # of the allocator's, which serve the graphs alone
    slack_bytes: int = 0  # of these, what no tensor has between two replays
    driver_bytes: int = 0  # beside the allocator's: the graphs themselves


class Graphs:
    """Whole steps are captured when this is made; `progress` is told how many of how many exist.

    A step of which more is asked than a token replays the forward pass alone, captured when first needed.
    """

    def __init__(self, step: DecodeStep, state: DeviceState, progress: Callable[[int, int], None]) -> None:
        self._step = step
        self._state = state
        sizes = batch_sizes(state.padding)
        self._size_of = np.searchsorted(sizes, np.arange(sizes[-1] + 1))
        self._sizes = sizes
        self._graphs: dict[tuple[int, Variant | None], Graph] = {}
        self._pool = devices.GraphPool()
        self._logits: Tensor | None = None
        self.memory = GraphMemory()
        before = self._held()
        total = len(sizes) * len(CAPTURED)
        progress(0, total)
        # the largest first: its buffers are cut into those of all others
        for size in reversed(sizes):
            for variant in CAPTURED:
                # a draw's kernels serve every size, and a forward pass is the same under both draws
                is_known = size < sizes[-1] and variant != CAPTURED[0]
                self._capture(size, variant, partial(step, size, variant), is_known=is_known)
                progress(len(self._graphs), total)
        self._account(before)

    def step(self, num_rows: int, variant: Variant) -> Graph:
        """-> token ids; the smallest that holds so many rows."""
        return self._graphs[self._size(num_rows), "greedy" if variant == "greedy" else "full"]

    def forward(self, num_rows: int) -> Graph:
        """-> logits; lengths and last tokens are still to be written. It may select other rows."""
        size = self._size(num_rows)
        if (size, None) not in self._graphs:
            before = self._held()
            self._capture(size, None, partial(self._forward, size))
            self._account(before)
        return self._graphs[size, None]

    def _size(self, num_rows: int) -> int:
        return self._sizes[self._size_of[num_rows]]

    def _forward(self, size: int) -> Tensor:
        logits = self._step.logits(size, [])
        if self._logits is None:  # one for all sizes: in the pool each graph would keep its own
            self._logits = torch.empty(self._sizes[-1], logits.shape[1], device=logits.device)
        return self._logits[:size].copy_(logits)

    def _held(self) -> tuple[int, int, int]:
        device = self._state.device
        in_torch = devices.memory_used_bytes(device)
        return in_torch, devices.memory_kept_bytes(device), devices.memory_taken_bytes(device) - in_torch

    def _account(self, before: tuple[int, int, int]) -> None:
        """What was captured since `before` is the graphs'."""
        buffers, slack, driver = (now - then for now, then in zip(self._held(), before, strict=True))
        known = self.memory
        self.memory = GraphMemory(
            known.buffer_bytes + buffers, known.slack_bytes + slack, known.driver_bytes + max(driver, 0)
        )

    @torch.inference_mode()
    def _capture(
        self, size: int, variant: Variant | None, run: Callable[[], Tensor], *, is_known: bool = False
    ) -> None:
        """On padding alone: block 0 takes what it writes. `is_known`: all its kernels have been launched."""
        self._state.select(np.empty(0, np.int64), size)
        self._state.flush()
        try:
            captured = self._pool.capture(run, is_known=is_known)
        except Exception as error:
            raise DeviceError(
                f"the decode step of {size} requests ({variant or 'forward'}) cannot be captured as a CUDA "
                f"graph: {type(error).__name__}: {error}",
                hint="`--cuda-graphs off` runs it kernel by kernel, which is slower",
            ) from error
        self._graphs[size, variant] = Graph(size, captured)
