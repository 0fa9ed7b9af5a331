"""Steps captured once for each size: to replay one costs the host a single call.

runner --step, forward--> Graph --replay--> token ids, logits
       '--mixed---------> MixedGraph --fill, replay--> logits

Sizes of decode steps grow by eight, all captured before ready; those of steps with prompts are captured while
nobody asks for anything, or by the first step that has one. What is left of a size is padding.
All graphs share one pool of memory, which is safe because only one of them runs at a time, and because what
a step gives is copied away before the next begins.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.decode_step import DecodeStep
from service.engine.mixed_step import MixedInputs, MixedShape, MixedStep, MixedSteps
from service.engine.sampler import Variant
from service.engine.state import DeviceState
from service.errors import DeviceError

logger = logging.getLogger(__name__)

# the full one also serves rows that only have temperatures: the kernels of the filters end at once for them,
# predicted to cost 5 to 14 us a step, where a third graph for each size would cost every start a second
CAPTURED: tuple[Variant, ...] = ("full", "greedy")
MOST_MIXED = 96  # of some 2 MB each, for a model of 32 layers
SPARE_BYTES = 256 << 20  # of the device: below that nothing more is captured, others need them more
MOST_DRIVER_BYTES = 16 << 20  # of a graph; where memory went faster it went to another process


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
class MixedGraph:
    step: MixedStep
    captured: devices.Captured

    def replay(self, inputs: MixedInputs) -> Tensor:
        """-> [rows that are asked for, vocab], overwritten by the next replay of any graph."""
        self.step.fill(inputs)
        return self.captured.replay()[: len(inputs.logit_rows)]


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """What all graphs together hold: bytes."""

    buffer_bytes: int = 0  # of the allocator's, which serve the graphs alone
    slack_bytes: int = 0  # of these, what no tensor has between two replays
    driver_bytes: int = 0  # beside the allocator's: the graphs themselves


class Graphs:
    """Whole decode steps are captured when this is made, and the largest with prompts; `progress` is told how
    many of how many exist.

    A step of which more is asked than a token replays the forward pass alone, captured when first needed.
    """

    def __init__(
        self,
        step: DecodeStep,
        state: DeviceState,
        progress: Callable[[int, int], None],
        mixed_steps: MixedSteps | None = None,
    ) -> None:
        """Without `mixed_steps` no step with prompts is captured."""
        self._step = step
        self._state = state
        sizes = batch_sizes(state.padding)
        self._size_of = np.searchsorted(sizes, np.arange(sizes[-1] + 1))
        self._sizes = sizes
        self._graphs: dict[tuple[int, Variant | None], Graph] = {}
        self._mixed_steps = mixed_steps
        self._mixed: dict[MixedShape, MixedGraph] = {}
        self._uncaptured = mixed_steps.usual() if mixed_steps else []
        self._takes_more = True
        self._pool = devices.GraphPool()
        self._logits: Tensor | None = None
        self.memory = GraphMemory()
        before = self._held()
        total = len(sizes) * len(CAPTURED) + (mixed_steps is not None)
        progress(0, total)
        # the largest first: its buffers are cut into those of all others
        if mixed_steps:
            self._capture_mixed(mixed_steps, mixed_steps.largest, is_known=False)
            progress(1, total)
        for size in reversed(sizes):
            for variant in CAPTURED:
                # a draw's kernels serve every size, and a forward pass is the same under both draws
                is_known = size < sizes[-1] and variant != CAPTURED[0]
                self._capture(size, variant, partial(step, size, variant), is_known=is_known)
                progress(len(self._graphs) + len(self._mixed), total)
        self._account(before, total)

    def step(self, num_rows: int, variant: Variant) -> Graph:
        """-> token ids; the smallest that holds so many rows."""
        return self._graphs[self._size(num_rows), "greedy" if variant == "greedy" else "full"]

    def forward(self, num_rows: int) -> Graph | None:
        """-> logits; lengths and last tokens are still to be written. It may select other rows.

        None where it is to run kernel by kernel.
        """
        size = self._size(num_rows)
        if (size, None) not in self._graphs:
            self._add(lambda: self._capture(size, None, partial(self._forward, size)))
        return self._graphs.get((size, None))

    def mixed(self, inputs: MixedInputs) -> MixedGraph | None:
        """None where a step with prompts is to run kernel by kernel."""
        if self._mixed_steps is None or (shape := self._mixed_steps.shape_of(inputs)) is None:
            return None
        if shape not in self._mixed:
            self._add_mixed(self._mixed_steps, shape)
        return self._mixed.get(shape)

    @property
    def is_complete(self) -> bool:
        """Whether `capture_one` has nothing left to do."""
        return not self._uncaptured

    def capture_one(self) -> None:
        """Of the usual steps with prompts, before one of them needs it."""
        shape = self._uncaptured.pop(0)
        if self._mixed_steps and shape not in self._mixed:
            self._add_mixed(self._mixed_steps, shape)

    def _add_mixed(self, steps: MixedSteps, shape: MixedShape) -> None:
        if len(self._mixed) < MOST_MIXED:
            self._add(lambda: self._capture_mixed(steps, shape, is_known=True))

    def _add(self, capture: Callable[[], None]) -> None:
        """One more, behind ready, unless something speaks against it, now or earlier."""
        if not self._takes_more:
            return
        free = devices.memory_free_bytes(self._state.device)
        if free < SPARE_BYTES:
            self._take_no_more(f"{free >> 20} MiB of memory are free")
            return
        before = self._held()
        try:
            capture()
        except DeviceError as error:
            self._take_no_more(str(error))
            return
        self._account(before, 1)

    def _take_no_more(self, reason: str) -> None:
        """Said once; what is captured is replayed as before."""
        logger.warning("what is not captured yet runs kernel by kernel from now on: %s", reason)
        self._takes_more = False
        self._uncaptured.clear()

    def _size(self, num_rows: int) -> int:
        return self._sizes[self._size_of[num_rows]]

    def _forward(self, size: int) -> Tensor:
        return self._keep(self._step.logits(size, []))

    def _keep(self, logits: Tensor) -> Tensor:
        """-> float32. One tensor for all sizes: in the pool each graph would keep its own."""
        if self._logits is None:
            self._logits = torch.empty(self._sizes[-1], logits.shape[1], device=logits.device)
        return self._logits[: len(logits)].copy_(logits)

    def _held(self) -> tuple[int, int, int]:
        device = self._state.device
        in_torch = devices.memory_used_bytes(device)
        return in_torch, devices.memory_kept_bytes(device), devices.memory_taken_bytes(device) - in_torch

    def _account(self, before: tuple[int, int, int], num_graphs: int) -> None:
        """What was taken since `before`, when so many were captured, is the graphs'."""
        buffers, slack, driver = (now - then for now, then in zip(self._held(), before, strict=True))
        if not 0 <= driver <= num_graphs * MOST_DRIVER_BYTES:
            driver = 0
        known = self.memory
        self.memory = GraphMemory(
            known.buffer_bytes + buffers, known.slack_bytes + slack, known.driver_bytes + driver
        )

    @torch.inference_mode()
    def _capture(
        self, size: int, variant: Variant | None, run: Callable[[], Tensor], *, is_known: bool = False
    ) -> None:
        """On padding alone: block 0 takes what it writes. `is_known`: all its kernels have been launched."""
        self._state.select(np.empty(0, np.int64), size)
        self._state.flush()
        with telling(f"the decode step of {size} requests ({variant or 'forward'})"):
            self._graphs[size, variant] = Graph(size, self._pool.capture(run, is_known=is_known))

    @torch.inference_mode()
    def _capture_mixed(self, steps: MixedSteps, shape: MixedShape, *, is_known: bool) -> None:
        with telling(f"the step of {shape.num_rows} rows with prompts"):
            step = steps.make(shape)
            captured = self._pool.capture(lambda: self._keep(step()), is_known=is_known)
        self._mixed[shape] = MixedGraph(step, captured)


@contextmanager
def telling(step: str) -> Iterator[None]:
    """DeviceError in the place of whatever stops its capture."""
    try:
        yield
    except Exception as error:
        raise DeviceError(
            f"{step} cannot be captured as a CUDA graph: {type(error).__name__}: {error}",
            hint="`--cuda-graphs off` runs it kernel by kernel, which is slower",
        ) from error
