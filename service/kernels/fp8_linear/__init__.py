"""x against 8-bit floats (E4M3): rows of x and rows of the weight each have one scale (W8A8, dynamic).

precision/fp8 --x, codes, scales--> y = (xq @ wq.T) * x_scales * scales + bias. On CUDA rows are quantized in
Triton; few are multiplied by kernels/w8_linear where it serves, else in Triton, more by torch's scaled
matmul; on a CPU our own kernel (native.py) or the reference computes it. Source: arXiv 2209.05433, section 3.
"""

import torch
from torch import Tensor

from service.kernels.fp8_linear import reference
from service.kernels.fp8_linear.reference import LARGEST, quantize_rows
from service.kernels.w8_linear import FewRows

__all__ = ["LARGEST", "fp8_linear", "gated_linear", "normed_linear", "quantize_rows"]

if torch.cuda.is_available():
    from service.kernels.fp8_linear import triton as cuda


def fp8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, few: FewRows | None = None
) -> Tensor:
    """[T, in], float8_e4m3fn [out, in], float32 [out], [out] or None -> [T, out] in x's dtype.

    On CUDA in and out are multiples of 16 and x is bfloat16. `few`: the same weight for few rows there.
    """
    if x.is_cuda:
        return cuda.fp8_linear(x, codes, scales, bias, few)
    return reference.fp8_linear(x, codes, scales, bias)


def gated_linear(
    gate_up: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, few: FewRows | None = None
) -> Tensor:
    """On CUDA: `fp8_linear` of kernels/gated_silu of [T, 2 in], which is not written in 16 bits."""
    return cuda.gated_linear(gate_up, codes, scales, bias, few)


def normed_linear(
    hidden: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    few: FewRows | None = None,
) -> tuple[Tensor, Tensor]:
    """On CUDA: hidden + delta [T, in], and `fp8_linear` of its norm (kernels/add_rms_norm)."""
    return cuda.normed_linear(hidden, delta, gain, eps, codes, scales, bias, few)
