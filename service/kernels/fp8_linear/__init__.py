"""x against 8-bit floats (E4M3): rows of x and rows of the weight each have one scale (W8A8, dynamic).

precision/fp8 --x, codes, scales--> y = (xq @ wq.T) * x_scales * scales + bias. On CUDA torch's scaled matmul
computes it, on a CPU our own kernel (native.py) or the reference. Source: arXiv 2209.05433, section 3.
"""

import torch
from torch import Tensor

from service.kernels.fp8_linear import reference
from service.kernels.fp8_linear.reference import LARGEST, quantize_rows

__all__ = ["LARGEST", "fp8_linear", "quantize_rows"]


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """[T, in], float8_e4m3fn [out, in], float32 [out], [out] or None -> [T, out] in x's dtype.

    On CUDA in and out are multiples of 16 and x is bfloat16.
    """
    if not x.is_cuda:
        return reference.fp8_linear(x, codes, scales, bias)
    rows, row_scales = quantize_rows(x)
    y: Tensor = torch._scaled_mm(
        rows, codes.t(), row_scales[:, None], scales[None, :], bias=bias, out_dtype=x.dtype
    )
    return y
