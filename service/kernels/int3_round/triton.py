"""Weights rounded to three bits on CUDA: a group's weights stay in registers while all clippings are tried.

As the reference computes: every operation is rounded by itself, divisions too (`contracts=False`, `div_rn`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.int3_round.reference import ERROR_POWER, LARGEST, LEAST, WHOLE
from service.kernels.launch import await_predecessor, cdiv, launch

WEIGHTS = 2048  # of a program

assert ERROR_POWER == 6, "which is written out"


@triton.jit  # type: ignore[untyped-decorator]
def rounded(value, LARGEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """To a whole number, halves to even ones, within 0 and LARGEST; |value| is below 2^22."""
    whole = (value + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(whole, 0.0), LARGEST)


@triton.jit(do_not_specialize=["num_groups"])  # type: ignore[untyped-decorator]
def round_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # [num_groups, GROUP], any float
    codes_ptr,  # uint8 [num_groups, GROUP]
    zeros_ptr,  # uint8 [num_groups]
    scales_ptr,  # float16 [num_groups]
    num_groups,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LARGEST: tl.constexpr,
    WHOLE: tl.constexpr,
    LEAST: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    groups = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    places = groups[:, None].to(tl.int64) * GROUP + tl.arange(0, GROUP)[None, :]
    inside = groups < num_groups
    weight = tl.load(weight_ptr + places, mask=inside[:, None], other=0.0).to(tl.float32)
    low = tl.minimum(tl.min(weight, 1), 0.0)
    high = tl.maximum(tl.max(weight, 1), 0.0)
    span = tl.where(high == low, 1.0, high - low)
    nothing = tl.zeros([GROUPS], tl.float32)
    scale, zero, least = nothing, nothing, nothing
    for kept in range(WHOLE, LEAST - 1, -1):
        clipping = tl.div_rn(nothing + kept, nothing + WHOLE)
        step = tl.div_rn((high - low) * clipping, nothing + LARGEST).to(tl.float16).to(tl.float32)
        step = tl.where(step == 0.0, 1.0, step)
        middle = rounded(tl.div_rn(-low * clipping, step), LARGEST)
        codes = rounded(tl.div_rn(weight, step[:, None]) + middle[:, None], LARGEST)
        # in units of the range: a small weight's sixth power is no float32
        left = tl.div_rn((codes - middle[:, None]) * step[:, None] - weight, span[:, None])
        square = left * left
        error = tl.sum(square * square * square, 1)
        is_better = (error < least) | (kept == WHOLE)
        scale = tl.where(is_better, step, scale)
        zero = tl.where(is_better, middle, zero)
        least = tl.where(is_better, error, least)
    codes = rounded(tl.div_rn(weight, scale[:, None]) + zero[:, None], LARGEST)
    tl.store(codes_ptr + places, codes.to(tl.uint8), mask=inside[:, None])
    tl.store(zeros_ptr + groups, zero.to(tl.uint8), mask=inside)
    # least and greatest pass over what is no number; 0 times it is none
    scale += tl.sum(weight * 0.0, 1)
    tl.store(scales_ptr + groups, scale.to(tl.float16), mask=inside)


def round_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = weight.contiguous()
    out_features, in_features = weight.shape
    num_groups = in_features // group_size
    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    zeros = weight.new_empty(out_features, num_groups, dtype=torch.uint8)
    scales = weight.new_empty(out_features, num_groups, dtype=torch.float16)
    groups = WEIGHTS // group_size
    launch(
        round_kernel,
        (cdiv(out_features * num_groups, groups),),
        (weight, codes, zeros, scales),
        (out_features * num_groups,),
        (group_size, groups, LARGEST, WHOLE, LEAST),
        num_warps=4,
        contracts=False,
    )
    return codes, zeros, scales
