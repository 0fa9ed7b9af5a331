"""LLM.int8() linears in C for bfloat16 activations: bitsandbytes' codes of x and of the weights, bit for bit.

The weights' codes lie in blocks of 64 outputs, four features side by side, each plus 128: the CPU multiplies
unsigned bytes with signed ones. Outlier features are multiplied in float32 with dequantized weights, and the
sum of both shares is rounded once, where bitsandbytes rounds each and the weights too.
"""

from collections.abc import Callable
from ctypes import c_char_p, c_int64, c_void_p
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import bf16_rows, load, loaded
from service.kernels.native.blocks import BLOCK, from_blocks, to_blocks

FEATURES = 4  # side by side
SIGN = 0x80  # of a code; flipped, it is the code plus 128
_arguments = Struct("5P3qd").pack  # struct int8_linear in int8_linear_avx512.c


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


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """x bfloat16 [T, in] -> [T, out]; a feature that reaches `threshold` in any row is an outlier.

    The threshold is compared with x in float16, so it must be a float16's value; 0: there are no outliers.
    """
    num_blocks, quads, _ = codes.shape
    in_features, out_features = quads * FEATURES, num_blocks * BLOCK
    x = bf16_rows(x, in_features)
    num_rows = x.shape[0]
    y = x.new_empty(num_rows, out_features)
    _functions()[0](
        _arguments(
            x.data_ptr(),
            codes.data_ptr(),
            scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            num_rows,
            in_features,
            out_features,
            threshold,
        )
    )
    return y


def quantize(x: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What `linear` makes of x first, as bitsandbytes' `int8_vectorwise_quant` returns it.

    Codes int8 [T, in], scales float32 [T], outlier features int64.
    """
    num_rows, in_features = x.shape
    x = bf16_rows(x, in_features)
    codes = torch.empty(num_rows, in_features, dtype=torch.int8)
    scales = torch.empty(num_rows)
    outliers = torch.empty(in_features, dtype=torch.int32)
    arguments = _arguments(x.data_ptr(), 0, 0, 0, 0, num_rows, in_features, 0, threshold)
    count = _functions()[1](arguments, codes.data_ptr(), scales.data_ptr(), outliers.data_ptr())
    return codes, scales, outliers[:count].long()


@cache
def _functions() -> tuple[Callable[[bytes], None], Callable[..., int]]:
    library = loaded()
    pointers = [c_void_p] * 3
    return (
        library.function("halftone_int8_linear", [c_char_p]),
        library.function("halftone_int8_quantize", [c_char_p, *pointers], c_int64),
    )
