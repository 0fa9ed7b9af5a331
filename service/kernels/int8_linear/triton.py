"""LLM.int8() linears on CUDA: rows of codes against rows of codes on the int8 tensor cores, outliers too.

Few rows: all three levels of codes of a row (kernels/int8_rows) are multiplied in one product, so the weight
is read once, as it is, and outliers cost nothing. The weight is the left operand, whose narrow side the rows
fill; few outputs leave most of the machine idle, so the inputs are split: each share leaves its sums in
scratch memory, and whoever comes last adds them. Many rows: three products would cost too much, so only the
listed columns of the weight are multiplied with the two levels of outliers.

All sums are exact integers and what is made of them is rounded alike everywhere, so a row's result, bit for
bit, depends neither on the rows beside it nor on which of the kernels computes it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.dense_linear.triton import LINE, arrivals
from service.kernels.int8_columns.triton import in_float16
from service.kernels.int8_linear.plan import FEW_ROWS, PLACES, Block, Tile, block_for, splits_of, tile_for
from service.kernels.int8_rows import ALL_LIVE, Live, OutlierRule
from service.kernels.int8_rows.triton import (
    COARSE_STEP,
    FINE_STEP,
    LARGEST_OUTLIER,
    Rows,
    outlier_codes,
    quantize_gated,
    quantize_normed,
    quantize_rows,
)
from service.kernels.launch import await_then_release, cdiv, launch, next_power_of_2
from service.kernels.w8_linear import AFTER_ROWS, Tiles

LINE_BYTES = 2 * LINE
TILE_LISTED = 32  # columns of outliers in a product of many rows


@triton.jit  # type: ignore[untyped-decorator]
def finished(sums, scales_ptr, bias_ptr, outputs, is_output, BIASED: tl.constexpr, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 sums of all levels times the weights' scales, plus the bias; outputs lie along 1 - AXIS."""
    step = tl.math.div_rn(tl.load(scales_ptr + outputs, mask=is_output, other=0.0), 127.0)
    y = sums * tl.expand_dims(step, AXIS)
    if BIASED:
        bias = tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
        y += tl.expand_dims(bias, AXIS)
    return y


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def few_rows_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,  # int8 [LEVELS, num_rows, in_features]
    row_scales_ptr,  # float32 [NUM_SCALES, num_rows]
    weight_ptr,  # int8 [out_features, in_features]
    scales_ptr,  # float32 [out_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]
    parts_ptr,  # int32 [SPLITS, LEVELS * num_rows, out_features]
    arrived_ptr,  # int32 [tiles], zeros before and after
    num_rows,
    in_features,
    share,  # inputs of a split, a multiple of TILE_IN
    out_features,
    BIASED: tl.constexpr,
    LEVELS: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,  # a power of two; three levels have room for four
    EVEN: tl.constexpr,  # splits are whole
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    LINE: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    PLACES: tl.constexpr = ROWS * (4 if LEVELS == 3 else 1)  # noqa: N806
    tile = tl.program_id(0)
    split = tl.program_id(1)
    outputs = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    is_output = outputs < out_features
    # what lies behind the last output is computed from the last one's weights, and not stored
    read = tl.minimum(outputs, out_features - 1).to(tl.int64)
    if IS_DEPENDENT:
        # the first tiles of the weight come into the L2 cache while the predecessor ends
        lines = tl.arange(0, PREFETCHED // LINE) * LINE
        begin = read[:, None] * in_features + split * share
        ahead = weight_ptr + begin + tl.minimum(lines, in_features - split * share - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ahead], tl.int32, is_pure=False, pack=1
        )
    await_then_release(IS_DEPENDENT)
    place = tl.arange(0, PLACES)
    level = place // ROWS
    row = place % ROWS
    is_row = (row < num_rows) & (level < LEVELS)
    source = level * num_rows + row
    inputs = split * share + tl.arange(0, TILE_IN)
    weight_at = weight_ptr + read[:, None] * in_features + inputs[None, :]
    codes_at = codes_ptr + source[None, :] * in_features + inputs[:, None]
    total = tl.zeros([TILE_OUT, PLACES], tl.int32)
    for start in range(0, share, TILE_IN):
        if EVEN:
            weight = tl.load(weight_at, eviction_policy="evict_first")
            codes = tl.load(codes_at, mask=is_row[None, :], other=0)
        else:
            is_input = inputs + start < in_features
            weight = tl.load(weight_at, mask=is_input[None, :], other=0, eviction_policy="evict_first")
            codes = tl.load(codes_at, mask=is_row[None, :] & is_input[:, None], other=0)
        total = tl.dot(weight, codes, total, out_dtype=tl.int32)
        weight_at += TILE_IN
        codes_at += TILE_IN
    is_last = True
    if SPLITS > 1:
        part = LEVELS * num_rows * out_features
        at = source[None, :] * out_features + outputs[:, None]
        is_part = is_row[None, :] & is_output[:, None]
        tl.store(parts_ptr + split * part + at, total, mask=is_part)
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            for other in tl.static_range(SPLITS):
                others = is_part & (split != other)
                total += tl.load(parts_ptr + other * part + at, mask=others, other=0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    if is_last:
        step = tl.load(row_scales_ptr + source, mask=is_row, other=0.0)
        wide = total.to(tl.float32) * step[None, :]
        if LEVELS == 3:
            # each sum has one number that is not masked, so none of them rounds
            apart = tl.reshape(wide, [TILE_OUT, 4, ROWS])
            which = tl.arange(0, 4)[None, :, None]
            sums = tl.sum(tl.where(which == 0, apart, 0.0), 1)
            sums += tl.sum(tl.where(which == 1, apart, 0.0), 1)
            sums += tl.sum(tl.where(which == 2, apart, 0.0), 1)
        else:
            sums = wide
        y = finished(sums, scales_ptr, bias_ptr, outputs, is_output, BIASED, 1)
        rows = tl.arange(0, ROWS)
        y_at = out_ptr + rows[None, :] * out_features + outputs[:, None]
        is_stored = (rows < num_rows)[None, :] & is_output[:, None]
        tl.store(y_at, y.to(out_ptr.dtype.element_ty), mask=is_stored)


@triton.jit  # type: ignore[untyped-decorator]
def listed_product(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    columns_ptr,
    num_columns,
    most,  # float32 [rows], each row's largest outlier
    rows,
    outputs,  # both int64, and within bounds
    threshold,
    in_features,
    BY_ROW: tl.constexpr,
    IS_FINE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Coarse or fine codes of outliers in the listed columns times the weight's -> int32 [rows, outputs]."""
    total = tl.zeros([TILE_ROWS, TILE_OUT], tl.int32)
    for start in range(0, num_columns, TILE):
        place = start + tl.arange(0, TILE)
        is_listed = place < num_columns
        column = tl.load(columns_ptr + place, mask=is_listed, other=0)
        x = tl.load(x_ptr + rows[:, None] * in_features + column[None, :])
        is_outlier = is_listed[None, :]
        if BY_ROW:
            is_outlier = is_outlier & (tl.abs(in_float16(x)) >= threshold)
        coarse, fine = outlier_codes(tl.where(is_outlier, x.to(tl.float32), 0.0), most[:, None])
        weight = tl.load(weight_ptr + outputs[None, :] * in_features + column[:, None])
        total = tl.dot(fine if IS_FINE else coarse, weight, total, out_dtype=tl.int32)
    return total


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def many_rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, in_features]
    codes_ptr,  # int8 [1, num_rows, in_features]
    row_scales_ptr,  # float32 [NUM_SCALES, num_rows]
    columns_ptr,  # int32 [in_features], if HAS_OUTLIERS
    num_columns_ptr,  # int32 [1]
    weight_ptr,  # int8 [out_features, in_features]
    scales_ptr,  # float32 [out_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]
    num_rows,
    in_features,
    out_features,
    threshold,
    BIASED: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    BY_ROW: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TILE_LISTED: tl.constexpr,
    COARSE_STEP: tl.constexpr,
    FINE_STEP: tl.constexpr,
    LARGEST_OUTLIER: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_then_release(IS_DEPENDENT)
    # neighbours share the outputs, whose weights so are read from memory once
    tiles_of_rows = tl.cdiv(num_rows, TILE_ROWS)
    rows = (tl.program_id(0) % tiles_of_rows) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    outputs = (tl.program_id(0) // tiles_of_rows) * TILE_OUT + tl.arange(0, TILE_OUT)
    is_row, is_output = rows < num_rows, outputs < out_features
    read_rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    read_outputs = tl.minimum(outputs, out_features - 1).to(tl.int64)
    inputs = tl.arange(0, TILE_IN)
    codes_at = codes_ptr + read_rows[:, None] * in_features + inputs[None, :]
    weight_at = weight_ptr + read_outputs[None, :] * in_features + inputs[:, None]
    total = tl.zeros([TILE_ROWS, TILE_OUT], tl.int32)
    for start in range(0, in_features, TILE_IN):
        if EVEN:
            codes, weight = tl.load(codes_at), tl.load(weight_at)
        else:
            is_input = inputs + start < in_features
            codes = tl.load(codes_at, mask=is_input[None, :], other=0)
            weight = tl.load(weight_at, mask=is_input[:, None], other=0)
        total = tl.dot(codes, weight, total, out_dtype=tl.int32)
        codes_at += TILE_IN
        weight_at += TILE_IN
    sums = total.to(tl.float32) * tl.load(row_scales_ptr + read_rows)[:, None]
    if HAS_OUTLIERS:
        num_columns = tl.load(num_columns_ptr)
        most = tl.load(row_scales_ptr + LARGEST_OUTLIER * num_rows + read_rows)
        for level in tl.static_range(COARSE_STEP, FINE_STEP + 1):
            kept = listed_product(
                x_ptr, weight_ptr, columns_ptr, num_columns, most, read_rows, read_outputs, threshold,
                in_features, BY_ROW, level == FINE_STEP, TILE_ROWS, TILE_OUT, TILE_LISTED,
            )  # fmt: skip
            sums += kept.to(tl.float32) * tl.load(row_scales_ptr + level * num_rows + read_rows)[:, None]
    y = finished(sums, scales_ptr, bias_ptr, outputs, is_output, BIASED, 0)
    y_at = out_ptr + rows.to(tl.int64)[:, None] * out_features + outputs[None, :]
    tl.store(y_at, y.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


def int8_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rule: OutlierRule,
    live: Live = ALL_LIVE,
    tiles: Tiles | None = None,
) -> Tensor:
    """See the package."""
    if tiles and len(x) > AFTER_ROWS:
        return tiles.multiply(quantize_rows(x, rule, live, marks=tiles.marks))
    rows = quantize_rows(x, rule, live, lists_columns=len(x) > FEW_ROWS)
    return multiply(rows, codes, scales, bias, rule)


def gated_linear(
    gate_up: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rule: OutlierRule,
    live: Live,
    tiles: Tiles | None = None,
) -> Tensor:
    """`int8_linear` of kernels/gated_silu of gate_up [T, 2 in], outliers by row."""
    if tiles and len(gate_up) > AFTER_ROWS:
        return tiles.multiply(quantize_gated(gate_up, rule, live, marks=tiles.marks))
    rows = quantize_gated(gate_up, rule, live, lists_columns=len(gate_up) > FEW_ROWS)
    return multiply(rows, codes, scales, bias, rule)


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
    """hidden + delta, and `int8_linear` of its norm as kernels/add_rms_norm, outliers by row."""
    if tiles and len(hidden) > AFTER_ROWS:
        total, rows = quantize_normed(hidden, delta, gain, eps, rule, live, marks=tiles.marks)
        return total, tiles.multiply(rows)
    lists_columns = len(hidden) > FEW_ROWS
    total, rows = quantize_normed(hidden, delta, gain, eps, rule, live, lists_columns=lists_columns)
    return total, multiply(rows, codes, scales, bias, rule)


def multiply(rows: Rows, codes: Tensor, scales: Tensor, bias: Tensor | None, rule: OutlierRule) -> Tensor:
    """Rows with columns if they are more than FEW_ROWS."""
    if rows.codes.shape[1] > FEW_ROWS:
        return many_rows(rows, codes, scales, bias, rule)
    return few_rows(rows, codes, scales, bias)


def few_rows(
    rows: Rows,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    tile: Tile | None = None,
    splits: int = 0,
) -> Tensor:
    """[T, out], T up to FEW_ROWS; 0 splits: as many as fit."""
    levels, num_rows, in_features = rows.codes.shape
    out_features = len(codes)
    tile = tile or tile_for(num_rows, in_features, out_features)
    splits = splits or splits_of(in_features, out_features, tile)
    share = cdiv(cdiv(in_features, splits), tile.inputs) * tile.inputs
    splits = cdiv(in_features, share)
    out = codes.new_empty(num_rows, out_features, dtype=rows.dtype)
    shape = (splits, levels * num_rows, out_features) if splits > 1 else (0,)
    parts = rows.codes.new_empty(shape, dtype=torch.int32)
    places = next(most for most in PLACES if num_rows <= most and (levels == 3 or most >= 16))
    launch(
        few_rows_kernel,
        (cdiv(out_features, tile.outputs), splits),
        (
            rows.codes,
            rows.scales,
            codes,
            scales,
            scales if bias is None else bias,
            out,
            parts,
            arrivals(codes.device),
        ),
        (num_rows, in_features, share, out_features),
        (
            bias is not None,
            levels,
            splits,
            places,
            share * splits == in_features,
            tile.outputs,
            tile.inputs,
            LINE_BYTES,
            next_power_of_2(tile.inputs * tile.num_stages),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        contracts=False,
    )
    return out


def many_rows(
    rows: Rows,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rule: OutlierRule,
    block: Block | None = None,
) -> Tensor:
    """[T, out], any T; `rows` with one level of codes and the outliers' columns."""
    _, num_rows, in_features = rows.codes.shape
    out_features = len(codes)
    block = block or block_for(num_rows, in_features, out_features)
    out = codes.new_empty(num_rows, out_features, dtype=rows.dtype)
    columns = rows.scales if rows.columns is None else rows.columns
    num_columns = rows.scales if rows.num_columns is None else rows.num_columns
    launch(
        many_rows_kernel,
        (cdiv(num_rows, block.rows) * cdiv(out_features, block.outputs),),
        (
            rows.codes if rows.x is None else rows.x,
            rows.codes,
            rows.scales,
            columns,
            num_columns,
            codes,
            scales,
            scales if bias is None else bias,
            out,
        ),
        (num_rows, in_features, out_features, rule.threshold),
        (
            bias is not None,
            rows.columns is not None,
            rule.by_row,
            in_features % block.inputs == 0,
            block.rows,
            block.outputs,
            block.inputs,
            TILE_LISTED,
            COARSE_STEP,
            FINE_STEP,
            LARGEST_OUTLIER,
        ),
        num_warps=block.num_warps,
        num_stages=block.num_stages,
        contracts=False,
    )
    return out
