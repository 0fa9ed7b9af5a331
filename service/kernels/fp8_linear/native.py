"""E4M3 linears in C for bfloat16 activations: the codes in blocks of 64 outputs, pairs of features together.

A row's sums take its features in their order whatever rows are computed with it, so its result does not
depend on them, bit for bit.
"""

import torch
from torch import Tensor

from service.kernels.native import load
from service.kernels.native.blocks import BLOCK, from_blocks, to_blocks
from service.kernels.native.linear import NativeLinear

PAIR = 2  # features side by side


def fits(device: torch.device, dtype: torch.dtype, out_features: int, in_features: int) -> bool:
    """Can a layer of this shape be served here, for activations of `dtype`?"""
    has_shape = out_features % BLOCK == 0 and in_features % PAIR == 0
    return device.type == "cpu" and dtype == torch.bfloat16 and has_shape and load() is not None


def pack(codes: Tensor) -> Tensor:
    """float8_e4m3fn [out, in] -> uint8 [out / 64, in / 2, 128]."""
    return to_blocks(codes.view(torch.uint8), PAIR)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    return from_blocks(packed, PAIR).view(torch.float8_e4m3fn)


def linear(codes: Tensor, scales: Tensor, bias: Tensor | None) -> NativeLinear:
    """What multiplies with this packed weight, `scales` float32 [out], `bias` [out] bfloat16."""
    num_blocks, pairs, _ = codes.shape
    told = codes, scales, bias
    return NativeLinear("halftone_fp8_linear", pairs * PAIR, num_blocks * BLOCK, "3P", *told)
