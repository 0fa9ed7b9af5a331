"""LLM.int8() linears in C for bfloat16 activations: bitsandbytes' codes of x and of the weights, bit for bit.

The weights' codes lie in blocks of 64 outputs, four features side by side, each plus 128: the CPU multiplies
unsigned bytes with signed ones. Outliers are multiplied in float32 with dequantized weights, and the sum of
both shares is rounded once, where bitsandbytes rounds each and the weights too.
"""

from ctypes import c_char_p, c_void_p
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import load, loaded
from service.kernels.native.blocks import BLOCK, from_blocks, to_blocks
from service.kernels.native.linear import NativeLinear

FEATURES = 4  # side by side
SIGN = 0x80  # of a code; flipped, it is the code plus 128
_arguments = Struct("2P3q3Pdq").pack  # struct int8_linear in int8_linear_avx512.c


def fits(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> bool:
    """Can a layer of this shape be served here, for activations of `dtype`?"""
    has_shape = out_features % BLOCK == 0 and in_features % FEATURES == 0
    return device.type == "cpu" and dtype == torch.bfloat16 and has_shape and load() is not None


def pack(codes: Tensor) -> Tensor:
    """int8 [out, in] -> uint8 [out / 64, in / 4, 256]."""
    return to_blocks(codes.view(torch.uint8) ^ SIGN, FEATURES)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    return (from_blocks(packed, FEATURES) ^ SIGN).view(torch.int8)


def linear(
    codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float, by_row: bool
) -> NativeLinear:
    """What multiplies with this weight, `bias` [out] bfloat16.

    A feature that reaches `threshold` is an outlier in the rows where it does (`by_row`), or in all rows of a
    call if it does in any; threshold 0: there are none.
    """
    num_blocks, quads, _ = codes.shape
    told = codes, scales, bias, in_float16(threshold), int(by_row)
    return NativeLinear("halftone_int8_linear", quads * FEATURES, num_blocks * BLOCK, "3Pdq", *told)


def quantize(x: Tensor, threshold: float, by_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear` makes of x first: codes int8 [T, in], scales float32 [T], outliers bool [T, in]."""
    num_rows, in_features = x.shape
    assert x.dtype is torch.bfloat16
    x = x.contiguous()
    codes = torch.empty(num_rows, in_features, dtype=torch.int8)
    scales = torch.empty(num_rows)
    flags = torch.empty(num_rows, -(-in_features // 64), 8, dtype=torch.uint8)
    function = loaded().function("halftone_int8_quantize", [c_char_p, *[c_void_p] * 3])
    told = in_float16(threshold), int(by_row)
    arguments = _arguments(x.data_ptr(), 0, num_rows, in_features, 0, 0, 0, 0, *told)
    function(arguments, codes.data_ptr(), scales.data_ptr(), flags.data_ptr())
    bits = flags[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return codes, scales, bits.view(num_rows, -1)[:, :in_features].bool()


def in_float16(threshold: float) -> float:
    """x is compared as float16, and bitsandbytes rounds the threshold likewise."""
    return float(torch.tensor(threshold).half())
