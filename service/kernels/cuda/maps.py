"""How the copy engine reads the rows of x: a tensor map for an address and number of rows, kept.

kernels/*/cuda.py --x--> readable, rows_map --> an argument of the launch

A captured step and its next capture ask for few.
"""

from typing import Any

from torch import Tensor

from service.kernels.cuda.driver import SWIZZLE_128, TensorMap, tensor_map

MAX_MAPS = 4096  # that are kept: 128 bytes each
ALIGNMENT = 16  # bytes
COLUMNS = 64  # of a box, of 16-bit numbers; of bytes twice as many

_maps: dict[tuple[Any, ...], TensorMap] = {}  # (address, rows, columns, type, rows of a box) -> map


def readable(x: Tensor) -> Tensor:
    """x, or a copy where its rows lie apart or at an odd address."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % ALIGNMENT else x


def rows_map(x: Tensor, box_rows: int) -> TensorMap:
    """Of a readable x [rows, columns]; boxes of `box_rows` times 128 bytes under the 128-byte swizzle."""
    key = (x.data_ptr(), x.shape[0], x.shape[1], x.dtype, box_rows)
    found = _maps.get(key)
    if found is None:
        if len(_maps) >= MAX_MAPS:
            _maps.clear()
        box = (box_rows, 2 * COLUMNS // x.dtype.itemsize)
        found = _maps[key] = tensor_map(key[0], x.dtype, (key[1], key[2]), box, SWIZZLE_128)
    return found
