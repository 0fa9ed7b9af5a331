"""AWQ linears in C for bfloat16 activations: AutoAWQ's bits in blocks of 64 outputs, at any number of rows.

Codes less 8 are exact in bfloat16; what a zero point takes from them is multiplied with the sum of x's group,
and a scale, in float16 as in the checkpoint, with the group's float32 sum: only y is rounded. A row's result
does not depend on the rows that it is computed with, bit for bit. The layout is drawn in
native/four_bit_linear_avx512.c.
"""

from torch import Tensor

from service.kernels.awq_linear.reference import unpack
from service.kernels.native import load
from service.kernels.native.blocks import BLOCK, from_blocks, from_nibbles, to_blocks, to_nibbles
from service.kernels.native.linear import NativeLinear

PAIR = 2  # features side by side
GROUP_MULTIPLE = 32
PACKED_DIMENSIONS = 3  # by which packed codes are known


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


def linear(codes: Tensor, zeros: Tensor, scales: Tensor, bias: Tensor | None) -> NativeLinear:
    """What multiplies with this weight, `bias` [out] bfloat16."""
    num_blocks, pairs, _ = codes.shape
    in_features = pairs * PAIR
    tensors = codes, zeros, scales, bias
    return NativeLinear(
        "halftone_awq_linear", in_features, num_blocks * BLOCK, "4Pq", *tensors, in_features // zeros.shape[1]
    )
