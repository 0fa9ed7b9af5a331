"""Reads numbers and adds them up, as fast as the device's memory gives them: the ceiling of every linear.

kernel_bench/reading --words--> a sum that nobody needs. On CUDA Triton, elsewhere torch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ways_to_read"]

# words of a tile, warps, programs a multiprocessor: which is fastest depends on how much is read
SHAPES = ((2048, 4, 8), (4096, 4, 4), (8192, 8, 2), (8192, 8, 4))


def ways_to_read(device: torch.device) -> list[Callable[[Tensor], Tensor]]:
    """Each takes float32 [n]; the numbers that it returns add up to those that it has read."""
    if device.type != "cuda":
        return [torch.sum]
    from service.kernels.read_only.triton import reader

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return [reader(device, tile, warps, multiprocessors * programs) for tile, warps, programs in SHAPES]
