"""What int8's layers count on a GPU, brought to the host about once a second without waiting for it.

child --now and then--> OutlierWatch --deltas--> StepStats
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from service.device import Readback

LOOK_S = 1.0


class OutlierWatch:
    """Begins with what has been counted so far, by the checks and first steps of a start."""

    def __init__(
        self,
        counts: Mapping[str, Tensor],
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`counts`: layer -> int64 [2] on the device, numbers multiplied in 16 bits and all numbers."""
        self._names = list(counts)
        self._counts = list(counts.values())
        self._device = device
        self._clock = clock
        self._looked_at = clock()
        self._told: list[list[int]] = [tensor.tolist() for tensor in self._counts]
        self._coming: Readback | None = None

    def look(self) -> dict[str, list[int]] | None:
        """What each layer has counted since it was last told, as of the look before; None between looks."""
        if not self._counts or self._clock() < self._looked_at + LOOK_S:
            return None
        self._looked_at = self._clock()
        arrived = self._coming
        self._coming = Readback([torch.stack(self._counts)], self._device)
        if arrived is None:
            return None
        counts: list[list[int]] = arrived.wait()[0].tolist()
        changes = {
            name: [now - then for now, then in zip(after, before, strict=True)]
            for name, after, before in zip(self._names, counts, self._told, strict=True)
        }
        self._told = counts
        return {name: change for name, change in changes.items() if any(change)} or None
