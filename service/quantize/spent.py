"""What quantizing takes: seconds by part, and the device's memory.

quantize_to, quantize_checkpoint --parts--> Spent --> cli/quantize
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from service import device as devices


class Spent:
    """Begins when it is made. A part within a part counts there alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._within = 0.0  # seconds of parts that ended inside the one under way
        devices.reset_memory_peak(device)

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """What happens inside, until the device has done it."""
        began, outside = time.monotonic(), self._within
        self._within = 0.0
        try:
            yield
            devices.synchronize(self.device)
        finally:
            took = time.monotonic() - began
            self.seconds[part] += took - self._within
            self._within = outside + took

    @property
    def peak_bytes(self) -> int:
        """Most that this process held of the device's memory since the beginning."""
        return devices.memory_peak_bytes(self.device)
