"""Linears of three bits on CUDA: unpacked in the tile on the way into the tensor cores.

One program makes a [BLOCK_M, BLOCK_N] tile of y for one share of the input features. A tile of codes is
loaded as words, low bits and high bits apart, along the outputs, and each word becomes 16 or 32 input
features without leaving its thread. Few rows leave most of the machine idle, so the input features are split:
each share writes its own float32 tile and torch adds the shares in their order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, cdiv, launch

MAX_SPLITS = 8
PROGRAMS = 264  # two for each multiprocessor of an H100: enough to hide the latency of the loads
BLOCK_N, BLOCK_K = 64, 64
STAGES = 3


# Compiled for none of the numbers that change with the rows of a step: a start captures some 34 sizes.
@triton.jit(do_not_specialize=["num_rows", "groups_per_split"])  # type: ignore[untyped-decorator]
def int3_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, in_features]
    codes_ptr,  # int32 [in_features / 32, 3, out_features]
    zeros_ptr,  # uint8 [in_features / GROUP, out_features / 2]
    scales_ptr,  # float16 [in_features / GROUP, out_features]
    y_ptr,  # float32 [splits, num_rows, out_features], or x's dtype [1, num_rows, out_features]
    num_rows,
    out_features,
    in_features,
    groups_per_split,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    split = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_groups = in_features // GROUP
    low_words = tl.arange(0, BLOCK_K // 16)
    high_words = tl.arange(0, BLOCK_K // 32)
    low_shifts, high_shifts = tl.arange(0, 16) * 2, tl.arange(0, 32)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

    for step in range(groups_per_split):
        group = split * groups_per_split + step
        # the last share may be shorter: masked groups have codes, zeros and scales of 0, so they add nothing
        inside = (columns < out_features) & (group < num_groups)
        pairs = tl.load(zeros_ptr + group * (out_features // 2) + columns // 2, mask=inside, other=0)
        zeros = pairs.to(tl.int32) >> columns % 2 * 4 & 15
        scales = tl.load(scales_ptr + group * out_features + columns, mask=inside, other=0.0)
        partial = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for inner in tl.static_range(GROUP // BLOCK_K):
            first = group * GROUP + inner * BLOCK_K
            k = first + tl.arange(0, BLOCK_K)
            x_mask = (rows[:, None] < num_rows) & (group < num_groups)
            x = tl.load(x_ptr + rows[:, None] * in_features + k[None, :], mask=x_mask, other=0.0)
            tile = codes_ptr + (first // 32) * 3 * out_features + columns[None, :]
            low_places = (low_words // 2 * 3 + low_words % 2)[:, None] * out_features
            high_places = (high_words * 3 + 2)[:, None] * out_features
            low = tl.load(tile + low_places, mask=inside[None, :], other=0)
            high = tl.load(tile + high_places, mask=inside[None, :], other=0)
            low = tl.reshape(low[:, None, :] >> low_shifts[None, :, None] & 3, (BLOCK_K, BLOCK_N))
            high = tl.reshape(high[:, None, :] >> high_shifts[None, :, None] & 1, (BLOCK_K, BLOCK_N))
            # -7..7 is exact in both 16-bit types, and the scale is applied once a group in float32
            weight = (low + high * 4 - zeros[None, :]).to(x.dtype)
            partial = tl.dot(x, weight, partial)
        total += partial * scales[None, :].to(tl.float32)

    target = y_ptr + (split * num_rows + rows[:, None]) * out_features + columns[None, :]
    tl.store(
        target,
        total.to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < num_rows) & (columns[None, :] < out_features),
    )


def int3_linear(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """[tokens, in] float16 or bfloat16 -> [tokens, out] in the same type."""
    x = x.contiguous()
    num_rows, in_features = x.shape
    num_groups, out_features = scales.shape
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    width, height = cdiv(out_features, BLOCK_N), cdiv(num_rows, block_m)
    splits = max(1, min(MAX_SPLITS, num_groups, PROGRAMS // max(width * height, 1)))
    groups_per_split = cdiv(num_groups, splits)
    splits = cdiv(num_groups, groups_per_split)
    y = x.new_empty(splits, num_rows, out_features, dtype=torch.float32 if splits > 1 else x.dtype)
    launch(
        int3_linear_kernel,
        (width, height, splits),
        (x, codes, zeros, scales, y),
        (num_rows, out_features, in_features, groups_per_split),
        (in_features // num_groups, block_m, BLOCK_N, BLOCK_K),
        num_warps=4,
        num_stages=STAGES,
    )
    return y[0] if splits == 1 else y.sum(0).to(x.dtype)
