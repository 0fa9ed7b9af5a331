"""LLM.int8() linears of our own: in C on a CPU, in Triton on CUDA, in torch elsewhere; and what they mean.

precision/int8 --x, codes, scales--> y. Source: arXiv 2208.07339.
"""

import torch
from torch import Tensor

from service.kernels.int8_linear import reference
from service.kernels.int8_rows import ALL_LIVE, Live, OutlierRule
from service.kernels.w8_linear import Tiles

__all__ = ["gated_linear", "int8_linear", "normed_linear"]

if torch.cuda.is_available():
    from service.kernels.int8_linear import triton as cuda


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rule: OutlierRule,
    live: Live = ALL_LIVE,
    tiles: Tiles | None = None,
) -> Tensor:
    """x [T, in] of any float type -> [T, out] in its type, rounded once; a row of padding may be anything.

    codes int8 [out, in], scales float32 [out] (the largest magnitude of each row of weights), bias [out] in
    x's type. On a CPU outliers are decided by row only, and not counted. `tiles`: the same weight for many
    rows on CUDA, by kernels/w8_linear.
    """
    if x.is_cuda:
        return cuda.int8_linear(x, codes, scales, bias, rule, live, tiles)
    assert rule.by_row
    return reference.linear(x, codes, scales, bias, rule.threshold)


def gated_linear(
    gate_up: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rule: OutlierRule,
    live: Live,
    tiles: Tiles | None = None,
) -> Tensor:
    """On CUDA, outliers by row: `int8_linear` of kernels/gated_silu of gate_up [T, 2 in]."""
    return cuda.gated_linear(gate_up, codes, scales, bias, rule, live, tiles)


def normed_linear(
    hidden: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rule: OutlierRule,
    live: Live,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """On CUDA, outliers by row: hidden + delta, and `int8_linear` of its norm, as kernels/add_rms_norm."""
    return cuda.normed_linear(hidden, delta, gain, eps, codes, scales, bias, rule, live, tiles)
