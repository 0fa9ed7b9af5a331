"""The ceiling: how long this device takes only to read as many bytes, from memory and not from a cache.

measure --bytes of a weight--> Reader.seconds --> the share of the ceiling that a kernel reaches

It is asked for each size of a weight, in calls that follow each other as the kernels' do, so that the
beginning and the end of a launch are in it too. Of several ways to read, the fastest counts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from service import device as devices
from service.kernels.read_only import ways_to_read

WORD_BYTES = 4
WORDS_TOGETHER = 64  # an odd number of words would be read one by one


class Reader:
    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats
        self._ways = ways_to_read(device)
        self._seconds: dict[tuple[int, int], float] = {}
        self.most_bytes_per_s = 0.0

    def seconds(self, num_bytes: int, copies: int) -> float:
        """Of reading `num_bytes`, the median; one after another in `copies` different places."""
        key = num_bytes, copies
        if key not in self._seconds:
            num_words = -(-num_bytes // (WORD_BYTES * WORDS_TOGETHER)) * WORDS_TOGETHER
            # ones: a page that was never written would be the one page of zeros, and cached
            words = [torch.ones(num_words, device=self._device) for _ in range(copies)]
            self._seconds[key] = min(self._time(way, words) for way in self._ways)
            self.most_bytes_per_s = max(self.most_bytes_per_s, num_bytes / self._seconds[key])
        return self._seconds[key]

    def _time(self, way: Callable[[Tensor], Tensor], words: list[Tensor]) -> float:
        def read() -> Tensor:
            for each in words:
                result = way(each)
            return result

        return devices.median_s(self._device, read, self._repeats, devices.graph_pool(self._device)) / len(
            words
        )
