"""AWQ linears in C for bfloat16 activations: AutoAWQ's bits in blocks of 64 outputs, at any number of rows.

Codes less 8 are exact in bfloat16; what a zero point takes from them is multiplied with the sum of x's group,
and a scale, in float16 as in the checkpoint, with the group's float32 sum: only y is rounded. A row's result
does not depend on the rows that it is computed with, bit for bit. The layout is drawn in
native/four_bit_linear_avx512.c.
"""

from collections.abc import Callable
from ctypes import c_char_p
from functools import cache
from struct import Struct

from torch import Tensor

from service.kernels.awq_linear.reference import unpack
from service.kernels.native import bf16_rows, load, loaded
from service.kernels.native.blocks import BLOCK, from_blocks, from_nibbles, to_blocks, to_nibbles

PAIR = 2  # features side by side
GROUP_MULTIPLE = 32
PACKED_DIMENSIONS = 3  # by which packed codes are known
_arguments = Struct("6P4q").pack  # struct awq_linear in four_bit_linear_avx512.c


def fits(qweight: Tensor, scales: Tensor) -> bool:
    """Can AutoAWQ's tensors of this shape be packed, here?"""
    groups, out_features = scales.shape
    has_shape = out_features % BLOCK == 0 and qweight.shape[0] // groups % GROUP_MULTIPLE == 0
    return qweight.is_cpu and has_shape and load() is not None


def is_packed(codes: Tensor) -> bool:
    return codes.dim() == PACKED_DIMENSIONS


def pack(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> codes uint8 [out / 64, in / 2, 64], zeros uint8 [.., groups, 32], scales f16 [.., groups, 64]."""
    codes = to_nibbles(unpack(qweight).t().contiguous(), PAIR)
    zeros = to_nibbles(unpack(qzeros).t().contiguous(), 1)
    return codes, zeros, to_blocks(scales.t().contiguous())


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """-> float32 [out, in]: (code - zero) * scale."""
    values = from_nibbles(codes, PAIR).float().unflatten(1, (zeros.shape[1], -1))  # [out, groups, group]
    centred = values - from_nibbles(zeros, 1).float().unsqueeze(-1)
    return (centred * from_blocks(scales).float().unsqueeze(-1)).flatten(1)


def linear(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x bfloat16 [T, in] -> [T, out]."""
    num_blocks, pairs, _ = codes.shape
    x = bf16_rows(x, pairs * PAIR)
    num_rows = x.shape[0]
    y = x.new_empty(num_rows, num_blocks * BLOCK)
    _function()(
        _arguments(
            x.data_ptr(),
            codes.data_ptr(),
            zeros.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_rows,
            pairs * PAIR,
            num_blocks * BLOCK,
            pairs * PAIR // zeros.shape[1],
        )
    )
    return y


@cache
def _function() -> Callable[[bytes], None]:
    return loaded().function("halftone_awq_linear", [c_char_p])
