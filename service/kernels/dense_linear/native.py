"""bfloat16 linears in C: the weights packed as [out / 64, in / 2, 64, 2], one kernel for any number of rows.

That is how oneDNN packs them as well. A row's sums take its features in their order whatever rows are
computed with it, so its result does not depend on them, bit for bit.
"""

from collections.abc import Callable
from ctypes import c_char_p, c_int64
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import load, loaded
from service.kernels.native.blocks import BLOCK, from_blocks, to_blocks
from service.kernels.native.linear import NativeLinear

PAIR = 2  # features side by side
PACKED_DIMENSIONS = 4  # by which a packed weight is known
_rows_arguments = Struct("3P3q").pack  # struct dense_rows in dense_linear_avx512.c


def fits(weight: Tensor) -> bool:
    """Can this plain weight [out, in] be packed, here?"""
    out_features, in_features = weight.shape
    has_shape = out_features % BLOCK == 0 and in_features % PAIR == 0
    return weight.is_cpu and weight.dtype is torch.bfloat16 and has_shape and load() is not None


def is_packed(weight: Tensor) -> bool:
    return weight.dim() == PACKED_DIMENSIONS


def pack(weight: Tensor) -> Tensor:
    """[out, in] -> [out / 64, in / 2, 64, 2]."""
    return to_blocks(weight, PAIR).unflatten(-1, (BLOCK, PAIR))


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    return from_blocks(packed.flatten(-2), PAIR)


def linear(packed: Tensor, bias: Tensor | None) -> NativeLinear:
    """What multiplies with this weight, `bias` [out] bfloat16."""
    num_blocks, pairs, _, _ = packed.shape
    return NativeLinear("halftone_dense_linear", pairs * PAIR, num_blocks * BLOCK, "2P", packed, bias)


class NativeTable:
    """A packed weight whose rows can be looked up: an embedding that is the head too."""

    def __init__(self, weight: Tensor) -> None:
        self.packed = pack(weight)

    def rows(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, in]; IndexError for an id that names no row."""
        num_blocks, pairs, _, _ = self.packed.shape
        ids = ids.contiguous()
        assert ids.dtype is torch.int64
        found = self.packed.new_empty(ids.shape[0], pairs * PAIR)
        addresses = self.packed.data_ptr(), ids.data_ptr(), found.data_ptr()
        if _rows()(_rows_arguments(*addresses, ids.shape[0], pairs, num_blocks * BLOCK)):
            raise IndexError(f"ids beyond the table's {num_blocks * BLOCK} rows")
        return found


@cache
def _rows() -> Callable[[bytes], int]:
    return loaded().function("halftone_dense_rows", [c_char_p], c_int64)
