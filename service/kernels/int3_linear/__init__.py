"""Linears of three bits a weight, a scale and a zero for each group of input features.

precision/int3 --pack (once, at load)--> codes, zeros, scales --int3_linear--> y. In Triton on CUDA, where
w4_linear's kernels do not serve, by the reference elsewhere; README.md draws the layout.
"""

import torch
from torch import Tensor

from service.kernels.int3_linear import reference
from service.kernels.int3_linear.reference import dequantize, pack, pack_zeros

__all__ = ["dequantize", "int3_linear", "pack", "pack_zeros"]

if torch.cuda.is_available():
    from service.kernels.int3_linear import triton as cuda


def int3_linear(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """x [tokens, in] -> [tokens, out] in its type; on CUDA float16 or bfloat16.

    codes int32 [in / 32, 3, out], zeros uint8 [groups, out / 2], scales float16 [groups, out].
    """
    if x.is_cuda:
        return cuda.int3_linear(x, codes, zeros, scales)
    return reference.int3_linear(x, codes, zeros, scales)
