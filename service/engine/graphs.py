"""Decode steps captured once for each batch size: to replay one costs the host a single call.

runner --find--> Graph --replay--> token ids

Sizes grow by eight; what is left of a size is padding. All graphs share one pool of memory, which is safe
because only one of them runs at a time, and because what a step gives is copied away before the next begins.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from service import device as devices
from service.engine.decode_step import DecodeStep
from service.engine.sampler import Variant
from service.engine.state import DeviceState
from service.errors import DeviceError

CAPTURED: tuple[Variant, ...] = ("temperature", "greedy")  # other steps run kernel by kernel


def batch_sizes(max_requests: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, ... and `max_requests`."""
    sizes = {size for size in (1, 2, 4, *range(8, max_requests, 8)) if size < max_requests}
    return sorted(sizes | {max_requests})


@dataclass(frozen=True, slots=True)
class Graph:
    num_rows: int
    captured: devices.Captured

    def replay(self) -> Tensor:
        """-> int64 [num_rows], overwritten by the next replay."""
        return self.captured.replay()


class Graphs:
    """Captured when made; `progress` is told how many of how many exist."""

    def __init__(self, step: DecodeStep, state: DeviceState, progress: Callable[[int, int], None]) -> None:
        sizes = batch_sizes(state.padding)
        self._size_of = np.searchsorted(sizes, np.arange(sizes[-1] + 1))
        self._sizes = sizes
        self._graphs: dict[tuple[int, Variant], Graph] = {}
        self._pool = devices.GraphPool()
        total = len(sizes) * len(CAPTURED)
        progress(0, total)
        # the largest first: its buffers are cut into those of all others
        for size in reversed(sizes):
            for variant in CAPTURED:
                self._capture(step, state, size, variant)
                progress(len(self._graphs), total)

    def find(self, num_rows: int, variant: Variant) -> Graph | None:
        """The smallest that holds so many rows."""
        return self._graphs.get((self._sizes[self._size_of[num_rows]], variant))

    @torch.inference_mode()
    def _capture(self, step: DecodeStep, state: DeviceState, size: int, variant: Variant) -> None:
        """On padding alone: block 0 takes what it writes."""
        state.select(np.empty(0, np.int64), size)
        state.flush()

        def run() -> Tensor:
            return step(size, variant, [], shapes_logits=variant != "greedy").token_ids

        try:
            captured = self._pool.capture(run)
        except Exception as error:
            raise DeviceError(
                f"the decode step of {size} requests ({variant}) cannot be captured as a CUDA graph: "
                f"{type(error).__name__}: {error}",
                hint="`--cuda-graphs off` runs it kernel by kernel, which is slower",
            ) from error
        self._graphs[size, variant] = Graph(size, captured)
