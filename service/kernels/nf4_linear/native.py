"""NF4 linears in C for bfloat16 activations: the same bits in blocks of 64 outputs, for any number of rows.

Levels are rounded to bfloat16, under a factor that leaves them the least error; absmax is applied to each
block's float32 sum, and under double quantization decoded on the way. A row's result does not depend on the
rows that it is computed with, bit for bit. The layout is drawn in native/four_bit_linear_avx512.c.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.kernels.native import load
from service.kernels.native.blocks import BLOCK, from_blocks, from_nibbles, to_blocks, to_nibbles
from service.kernels.native.linear import NativeLinear

PAIR = 2  # features side by side


@dataclass(frozen=True)
class Nested:
    """What codes of absmax mean: map[code] * absmax + offset, of the code's block of 256 and of its part."""

    map: Tensor  # float32 [256]
    absmax: Tensor  # float32 [blocks of all parts]
    offsets: Tensor  # float32 [parts]
    parts: Tensor  # int64 [parts, 2]: of each its first row and the place of its first block


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


def linear(codes: Tensor, absmax: Tensor, nested: Nested | None, bias: Tensor | None) -> NativeLinear:
    """What multiplies with this weight, `bias` [out] bfloat16."""
    num_blocks, pairs, _ = codes.shape
    fields: list[Tensor | int | None] = [codes, bias]
    if nested is None:
        fields += [absmax, None, None, None, None, None, 0]
    else:
        fields += [None, absmax, nested.map, nested.absmax, nested.offsets, nested.parts, len(nested.parts)]
    return NativeLinear("halftone_nf4_linear", pairs * PAIR, num_blocks * BLOCK, "8Pq", *fields)
