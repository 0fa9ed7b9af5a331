"""What `fp8_linear` computes, in float32: products of 8-bit floats are exact there."""

import torch
from torch import Tensor

LARGEST = 448.0  # of E4M3


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n] -> float8_e4m3fn [rows, n], rounded to nearest even, and float32 [rows], what they count.

    A row's largest magnitude becomes 448; a row of zeros has scale 1. NaN makes the whole row NaN.
    """
    wide = x.float()
    # by a tensor: a GPU multiplies by a number's rounded reciprocal instead, and ties fall to the other side
    scales = wide.abs().amax(1) / torch.full((), LARGEST, device=x.device)
    scales = torch.where(scales == 0, 1.0, scales)
    return (wide / scales[:, None]).to(torch.float8_e4m3fn), scales


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """See the package."""
    rows, row_scales = quantize_rows(x)
    y = rows.float() @ codes.float().t() * (row_scales[:, None] * scales)
    return (y if bias is None else y + bias.float()).to(x.dtype)
