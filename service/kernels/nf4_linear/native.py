"""NF4 linears in C for bfloat16 activations: the same bits in blocks of 64 outputs, for any number of rows.

Levels are rounded to bfloat16, under a factor that leaves them the least error; absmax is applied to each
block's float32 sum, and under double quantization decoded on the way. A row's result does not depend on the
rows that it is computed with, bit for bit. The layout is drawn in native/four_bit_linear_avx512.c.
"""

from collections.abc import Callable, Sequence
from ctypes import Array, addressof, c_char_p, c_int64
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import bf16_rows, load, loaded
from service.kernels.native.blocks import BLOCK, from_blocks, from_nibbles, to_blocks, to_nibbles

PAIR = 2  # features side by side
ABSMAX_BLOCK = 64  # weights under one absmax
_arguments = Struct("10P4q").pack  # struct nf4_linear in four_bit_linear_avx512.c


def fits(device: torch.device, dtype: torch.dtype, outs: Sequence[int]) -> bool:
    """Can parts with these numbers of outputs be served here, for activations of `dtype`?"""
    has_shape = all(out % BLOCK == 0 for out in outs)
    return device.type == "cpu" and dtype == torch.bfloat16 and has_shape and load() is not None


def pack_codes(codes: Tensor, out_features: int) -> Tensor:
    """uint8 [out * in / 2], a weight in the high nibble and its successor -> uint8 [out / 64, in / 2, 64]."""
    return to_nibbles(torch.stack((codes >> 4, codes & 0xF), dim=-1).view(out_features, -1), PAIR)


def unpack_codes(packed: Tensor) -> Tensor:
    """Inverse of `pack_codes`."""
    codes = from_nibbles(packed, PAIR)
    return (codes[:, 0::2] << 4 | codes[:, 1::2]).view(-1)


def pack_absmax(absmax: Sequence[Tensor], outs: Sequence[int], blocks_per_row: int) -> Tensor:
    """Of each part [out * blocks_per_row] and more, which is left out -> [out / 64, blocks_per_row, 64]."""
    rows = [part[: out * blocks_per_row] for part, out in zip(absmax, outs, strict=True)]
    return to_blocks(torch.cat(rows).view(-1, blocks_per_row))


def unpack_absmax(packed: Tensor) -> Tensor:
    """-> [out of all parts, blocks_per_row]."""
    return from_blocks(packed)


def part_table(outs: Sequence[int], nested: Sequence[int]) -> Array[c_int64]:
    """Of each part its first row and the place of its first nested absmax, from the numbers of both."""
    firsts = [(sum(outs[:part]), sum(nested[:part])) for part in range(len(outs))]
    return (c_int64 * (2 * len(outs)))(*(number for pair in firsts for number in pair))


def linear(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    double_quantized: tuple[Tensor, Tensor, Tensor, Array[c_int64]] | None,
    bias: Tensor | None,
) -> Tensor:
    """x bfloat16 [T, in] -> [T, out]; `double_quantized`: map, nested absmax, offsets and `part_table`."""
    num_blocks, pairs, _ = codes.shape
    x = bf16_rows(x, pairs * PAIR)
    num_rows = x.shape[0]
    y = x.new_empty(num_rows, num_blocks * BLOCK)
    if double_quantized is None:
        scales = absmax.data_ptr(), 0, 0, 0, 0, 0
        num_parts = 0
    else:
        levels, nested, offsets, parts = double_quantized
        pointers = levels.data_ptr(), nested.data_ptr(), offsets.data_ptr(), addressof(parts)
        scales = 0, absmax.data_ptr(), *pointers
        num_parts = len(parts) // 2
    _function()(
        _arguments(
            x.data_ptr(),
            codes.data_ptr(),
            *scales,
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_parts,
            num_rows,
            pairs * PAIR,
            num_blocks * BLOCK,
        )
    )
    return y


@cache
def _function() -> Callable[[bytes], None]:
    return loaded().function("halftone_nf4_linear", [c_char_p])
