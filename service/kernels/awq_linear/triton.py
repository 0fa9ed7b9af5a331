"""AWQ linears on CUDA: dequantized in registers on the way into the tensor cores.

One program makes a [BLOCK_M, BLOCK_N] tile of y for one share of the input features. Words are loaded once,
16 bytes a thread, and their eight nibbles become eight columns without leaving the thread. Few rows leave
most of the machine idle, so the input features are split: each share writes its own float32 tile and torch
adds the shares in their order. There are no atomics, so one input has one result. How tall a tile is and how
many shares there are follows from the number of rows, unless a row is to be the same among few and many.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, cdiv, launch

MAX_SPLITS = 8
PROGRAMS = 264  # two for each multiprocessor of an H100: enough to hide the latency of the loads
FIXED_ROWS = 64  # of a tile, where rows must not depend on their number
STAGES = 4


# Compiled for none of the numbers that change with the rows of a step: a start captures some 34 sizes.
@triton.jit(do_not_specialize=["num_rows", "groups_per_split"])  # type: ignore[untyped-decorator]
def awq_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, in_features]
    qweight_ptr,  # int32 [in_features, out_features / 8]
    qzeros_ptr,  # int32 [in_features / GROUP, out_features / 8]
    scales_ptr,  # float16 [in_features / GROUP, out_features]
    y_ptr,  # float32 [splits, num_rows, out_features], or x's dtype [1, num_rows, out_features]
    num_rows,
    num_words,  # out_features / 8, a number of its own so that the compiler sees when 16 divides it
    in_features,
    groups_per_split,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    num_columns = num_words * 8
    split = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    words = tl.program_id(0) * (BLOCK_N // 8) + tl.arange(0, BLOCK_N // 8)
    # column c of a word's eight lies in nibble 0, 4, 1, 5, 2, 6, 3, 7: the inverse of NIBBLE_TO_COLUMN
    eight = tl.arange(0, 8)
    shifts = ((eight // 2) + (eight % 2) * 4) * 4
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)

    for step in range(groups_per_split):
        group = split * groups_per_split + step
        # the last share may be shorter: masked groups have zeros and scales of 0, so they add nothing
        within = group * GROUP < in_features
        word_mask = (words[None, :] < num_words) & within
        column_mask = (columns[None, :] < num_columns) & within
        packed_zeros = tl.load(qzeros_ptr + group * num_words + words[None, :], mask=word_mask, other=0)
        zeros = tl.reshape((packed_zeros[:, :, None] >> shifts[None, None, :]) & 0xF, (1, BLOCK_N))
        scales = tl.load(scales_ptr + group * num_columns + columns[None, :], mask=column_mask, other=0.0)
        partial = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for inner in tl.static_range(GROUP // BLOCK_K):
            k = group * GROUP + inner * BLOCK_K + tl.arange(0, BLOCK_K)
            x_mask = (rows[:, None] < num_rows) & within
            x = tl.load(x_ptr + rows[:, None] * in_features + k[None, :], mask=x_mask, other=0.0)
            packed = tl.load(qweight_ptr + k[:, None] * num_words + words[None, :], mask=word_mask, other=0)
            codes = tl.reshape((packed[:, :, None] >> shifts[None, None, :]) & 0xF, (BLOCK_K, BLOCK_N))
            # -15..15 is exact in both 16-bit types, and the scale is applied once a group in float32
            partial = tl.dot(x, (codes - zeros).to(x.dtype), partial)
        total += partial * scales.to(tl.float32)

    target = y_ptr + (split * num_rows + rows[:, None]) * num_columns + columns[None, :]
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    tl.store(target, total.to(y_ptr.dtype.element_ty), mask=inside)


def tile(num_rows: int, group: int) -> tuple[int, int, int]:
    """Rows, columns and input features of a tile."""
    return 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64, 128, min(group, 64)


def awq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, *, deterministic: bool = False
) -> Tensor:
    """[tokens, in] float16 or bfloat16 -> [tokens, out] in the same type.

    `deterministic`: a row's result, bit for bit, does not depend on the others.
    """
    x = x.contiguous()
    num_rows, in_features = x.shape
    num_groups, out_features = scales.shape
    group = in_features // num_groups
    block_m, block_n, block_k = tile(FIXED_ROWS if deterministic else num_rows, group)
    width, height = cdiv(out_features, block_n), cdiv(num_rows, block_m)
    tiles = width if deterministic else width * height
    splits = max(1, min(MAX_SPLITS, num_groups, PROGRAMS // max(tiles, 1)))
    groups_per_split = cdiv(num_groups, splits)
    splits = cdiv(num_groups, groups_per_split)
    y = x.new_empty(splits, num_rows, out_features, dtype=torch.float32 if splits > 1 else x.dtype)
    launch(
        awq_linear_kernel,
        (width, height, splits),
        (x, qweight, qzeros, scales, y),
        (num_rows, out_features // 8, in_features, groups_per_split),
        (group, block_m, block_n, block_k),
        num_warps=4,
        num_stages=STAGES,
    )
    if splits == 1:
        return y[0]
    if not deterministic:
        return y.sum(0).to(x.dtype)
    total = y[0]
    for part in y[1:]:  # torch's sum may take them in another order for another number of rows
        total += part
    return total.to(x.dtype)
