"""bitsandbytes' codes of the rows of x on CUDA, and a row's outliers as 16-bit numbers in two rows of codes.

A row's largest magnitude has to be known before its first code. A program holds a whole row in registers
while it finds both, so the row is read, or made of what precedes the linear, once. Nothing asks the host.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.int8_columns.triton import (
    bits_of,
    flag_columns,
    in_float16,
    list_columns,
    zeroed_flags,
)  # fmt: skip
from service.kernels.int8_rows import ALL_LIVE, Live, Marks, OutlierRule
from service.kernels.launch import await_predecessor, await_then_release, launch, next_power_of_2

MOST_NUMBERS = 16384  # of a row that a program holds: longer rows are read twice, in parts
NUMBERS_OF_WARP = 512  # sixteen a thread
NUM_SCALES = 4
STEP, COARSE_STEP, FINE_STEP, LARGEST_OUTLIER = range(NUM_SCALES)


@dataclass(frozen=True)
class Rows:
    """What x [T, in] has become."""

    # int8 [levels, T, in]: what is below the threshold; with three levels also outliers, coarse and fine
    codes: Tensor
    scales: Tensor  # float32 [NUM_SCALES, T]: what a code of each level counts, and the row's largest outlier
    dtype: torch.dtype  # of x
    # where columns were asked for: x [T, in]; if listed, int32 [in], those with an outlier in any order, and
    # int32 [1]
    x: Tensor | None = None
    columns: Tensor | None = None
    num_columns: Tensor | None = None


@triton.jit
def nearest(x):  # type: ignore[no-untyped-def]
    """To the nearest integer, ties to even, for |x| < 2^22: what adding 1.5 * 2^23 leaves."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def per_127(most):  # type: ignore[no-untyped-def]
    """Codes per unit: 127 times the reciprocal, which a GPU approximates. That is how bitsandbytes' kernel
    divides there, and how torch does on a CPU, bit for bit."""
    return tl.where(most > 0, (1.0 / tl.where(most > 0, most, 1.0)) * 127.0, 0.0)


@triton.jit
def outlier_codes(outlier, most):  # type: ignore[no-untyped-def]
    """Numbers of a row whose largest is `most` -> coarse in 127ths of it, fine in 254ths of a coarse step."""
    step = tl.math.div_rn(most, 127.0)
    coarse = nearest(outlier * per_127(most))
    per_step = tl.where(step > 0, (1.0 / tl.where(step > 0, step, 1.0)) * 254.0, 0.0)
    fine = nearest((outlier - coarse * step) * per_step)
    return coarse.to(tl.int8), tl.minimum(tl.maximum(fine, -127.0), 127.0).to(tl.int8)


@triton.jit
def magnitude_bits(x):  # type: ignore[no-untyped-def]
    """float32 -> int32 in the order of |x|: above all infinity, above it NaN, which so survives a maximum."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def summed(x_ptr, delta_ptr, at, inside, ADDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The residual stream's numbers, as kernels/add_rms_norm rounds them."""
    total = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADDS:
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        total = (total.to(tl.float32) + delta.to(tl.float32)).to(total.dtype)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def numbers_of(  # type: ignore[no-untyped-def]
    x_ptr, delta_ptr, gain_ptr, row, columns, live, scale, total,
    SOURCE: tl.constexpr, ADDS: tl.constexpr, WIDTH: tl.constexpr, IS_HELD: tl.constexpr,
):  # fmt: skip
    """x in these columns, in its 16 bits: read, or made as kernels/gated_silu and add_rms_norm make it.

    `scale` is that of the norm, `total` its numbers where they are held.
    """
    inside = columns < WIDTH
    if SOURCE == "gate_up":
        at = x_ptr + row * (2 * WIDTH) + columns
        gate = tl.load(at, mask=inside, other=0.0)
        up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
        wide = gate.to(tl.float32)
        x = (wide / (1 + tl.exp(-wide)) * up).to(gate.dtype)
    elif SOURCE == "hidden":
        if not IS_HELD:
            total = summed(x_ptr, delta_ptr, row * WIDTH + columns, inside, ADDS)
        gain = tl.load(gain_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        x = ((total.to(tl.float32) * scale).to(total.dtype).to(tl.float32) * gain).to(total.dtype)
    else:
        x = tl.load(x_ptr + row * WIDTH + columns, mask=inside, other=0.0)
    return tl.where(live, x, 0.0).to(x.dtype)


# slots may begin anywhere in what a step uploads
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_rows", "slot_stride", "first_slot"], do_not_specialize_on_alignment=["slots_ptr"]
)
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, WIDTH], or twice as wide: gate and up
    delta_ptr,  # [num_rows, WIDTH], what ADDS to x before the norm
    gain_ptr,  # [WIDTH] of the norm
    total_ptr,  # [num_rows, WIDTH]: x with delta
    made_ptr,  # [num_rows, WIDTH]: what has been made of it, if KEEPS
    slots_ptr,  # int64 [num_rows], or one number for all
    # int8 [WIDTH]: by batch, what columns are outliers; by row, if LISTS, what is told of them, and
    # if MARKS int32 [words]: the bits of those with outliers
    flags_ptr,
    codes_ptr,  # int8 [LEVELS, num_rows, WIDTH]
    scales_ptr,  # float32 [NUM_SCALES, num_rows]
    counts_ptr,  # int64 [2]
    cleared_ptr,  # int32 [CLEARED]: becomes 0
    num_rows,
    slot_stride,  # 1, or 0
    first_slot,  # rows with slots below are padding
    threshold,
    eps,
    SOURCE: tl.constexpr,
    ADDS: tl.constexpr,
    BY_ROW: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr,
    LISTS: tl.constexpr,
    MARKS: tl.constexpr,
    KEEPS: tl.constexpr,
    CLEARED: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    if MARKS:  # for tiles in CUDA C++, one a multiprocessor
        await_predecessor(IS_DEPENDENT)
    else:
        await_then_release(IS_DEPENDENT)
    IS_HELD: tl.constexpr = WIDTH <= TILE  # noqa: N806
    row = tl.program_id(0).to(tl.int64)
    live = tl.load(slots_ptr + row * slot_stride) >= first_slot
    total = tl.zeros([TILE], total_ptr.dtype.element_ty)
    scale = 1.0
    if SOURCE == "hidden":
        squares = tl.zeros([TILE], tl.float32)
        for start in tl.static_range(0, WIDTH, TILE):
            columns = start + tl.arange(0, TILE)
            at = row * WIDTH + columns
            total = summed(x_ptr, delta_ptr, at, columns < WIDTH, ADDS)
            squares += total.to(tl.float32) * total.to(tl.float32)
            tl.store(total_ptr + at, total, mask=columns < WIDTH)
        scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    x = tl.zeros([TILE], x_ptr.dtype.element_ty)
    most_bits = tl.zeros([TILE], tl.int32)
    outlier_bits = tl.zeros([TILE], tl.int32)
    for start in tl.static_range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        x = numbers_of(
            x_ptr, delta_ptr, gain_ptr, row, columns, live, scale, total, SOURCE, ADDS, WIDTH, IS_HELD
        )
        bits = magnitude_bits(in_float16(x))
        if HAS_OUTLIERS:
            is_outlier = tl.abs(in_float16(x)) >= threshold
            bits = tl.where(is_outlier, 0, bits)
            if not BY_ROW:
                is_outlier = tl.load(flags_ptr + columns, mask=columns < WIDTH, other=0) != 0
            kept = tl.where(is_outlier, magnitude_bits(x.to(tl.float32)), 0)
            outlier_bits = tl.maximum(outlier_bits, kept)
        most_bits = tl.maximum(most_bits, bits)
    most = tl.max(most_bits, 0).to(tl.float32, bitcast=True)
    outlier_most = tl.max(outlier_bits, 0).to(tl.float32, bitcast=True)
    coarse_step = tl.math.div_rn(outlier_most, 127.0)
    tl.store(scales_ptr + row, tl.math.div_rn(most, 127.0))
    tl.store(scales_ptr + num_rows + row, coarse_step)
    tl.store(scales_ptr + 2 * num_rows + row, tl.math.div_rn(coarse_step, 254.0))
    tl.store(scales_ptr + 3 * num_rows + row, outlier_most)
    if CLEARED > 0 and row == 0:
        tl.store(cleared_ptr + tl.arange(0, CLEARED), tl.zeros([CLEARED], tl.int32))
    factor = per_127(most)
    num_kept = tl.zeros([TILE], tl.int32)
    for start in tl.static_range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        inside = columns < WIDTH
        if not IS_HELD:
            x = numbers_of(
                x_ptr, delta_ptr, gain_ptr, row, columns, live, scale, total, SOURCE, ADDS, WIDTH, IS_HELD
            )
        if KEEPS and SOURCE != "x":
            tl.store(made_ptr + row * WIDTH + columns, x, mask=inside)
        regular = in_float16(x)
        codes_at = codes_ptr + row * WIDTH + columns
        if HAS_OUTLIERS:
            is_outlier = tl.abs(regular) >= threshold
            regular = tl.where(is_outlier, 0.0, regular)
            if not BY_ROW:
                is_outlier = (tl.load(flags_ptr + columns, mask=inside, other=0) != 0) & live
                regular = tl.where(is_outlier, 0.0, regular)
            num_kept += is_outlier.to(tl.int32)
            if LEVELS == 3:
                outlier = tl.where(is_outlier, x.to(tl.float32), 0.0)
                coarse, fine = outlier_codes(outlier, outlier_most)
                level = num_rows.to(tl.int64) * WIDTH
                tl.store(codes_at + level, coarse, mask=inside)
                tl.store(codes_at + 2 * level, fine, mask=inside)
            if LISTS and BY_ROW:  # whoever finds one tells the same
                tl.store(flags_ptr + columns, tl.full([TILE], 1, tl.int8), mask=inside & is_outlier)
            if MARKS and BY_ROW:  # a row without outliers leaves memory alone
                words = start // 32 + tl.arange(0, TILE // 32)
                bits = bits_of(is_outlier, TILE // 32)
                tl.atomic_or(flags_ptr + words, bits, mask=bits != 0, sem="relaxed")
        tl.store(codes_at, nearest(regular * factor).to(tl.int8), mask=inside)
    if HAS_OUTLIERS:
        kept_here = tl.sum(num_kept, 0)
        if kept_here > 0:
            tl.atomic_add(counts_ptr, kept_here.to(tl.int64), sem="relaxed")
    if live:
        tl.atomic_add(counts_ptr + 1, tl.full([], WIDTH, tl.int64), sem="relaxed")


def held(width: int) -> tuple[int, int]:
    """-> how many numbers of a row a program holds at once, and in how many warps."""
    numbers = min(max(next_power_of_2(width), NUMBERS_OF_WARP), MOST_NUMBERS)
    return numbers, numbers // NUMBERS_OF_WARP


def quantize_rows(
    x: Tensor,
    rule: OutlierRule,
    live: Live = ALL_LIVE,
    *,
    lists_columns: bool = False,
    marks: Marks | None = None,
) -> Rows:
    """[T, in] of any float type -> its codes; padding has codes of 0.

    `lists_columns`, or `marks` of columns: one level of codes and x itself, else outliers are codes of two
    more levels.
    """
    x = x.contiguous()
    return _quantize("x", x, x, x, x, 0.0, x.shape[1], rule, live, lists_columns, marks)


def quantize_gated(
    gate_up: Tensor, rule: OutlierRule, live: Live, *, lists_columns: bool = False, marks: Marks | None = None
) -> Rows:
    """[T, 2 in] -> `quantize_rows` of kernels/gated_silu of it, outliers by row."""
    assert rule.by_row
    gate_up = gate_up.contiguous()
    width = gate_up.shape[1] // 2
    given = gate_up, gate_up, gate_up, gate_up
    return _quantize("gate_up", *given, 0.0, width, rule, live, lists_columns, marks)


def quantize_normed(
    hidden: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    rule: OutlierRule,
    live: Live,
    *,
    lists_columns: bool = False,
    marks: Marks | None = None,
) -> tuple[Tensor, Rows]:
    """hidden + delta [T, in], and `quantize_rows` of its norm as kernels/add_rms_norm, outliers by row."""
    assert rule.by_row
    hidden = hidden.contiguous()
    delta = hidden if delta is None else delta.contiguous()
    total, width = hidden.new_empty(hidden.shape), hidden.shape[1]
    rows = _quantize("hidden", hidden, delta, gain, total, eps, width, rule, live, lists_columns, marks)
    return total, rows


def _quantize(
    source: str,  # what x is
    x: Tensor,
    delta: Tensor,
    gain: Tensor,
    total: Tensor,
    eps: float,
    width: int,
    rule: OutlierRule,
    live: Live,
    lists_columns: bool,
    marks: Marks | None,
) -> Rows:
    num_rows = len(x)
    has_outliers = rule.threshold > 0
    lists = lists_columns and marks is None and has_outliers
    levels = 3 if has_outliers and not lists and marks is None else 1
    codes = x.new_empty(levels, num_rows, width, dtype=torch.int8)
    scales = x.new_empty(NUM_SCALES, num_rows, dtype=torch.float32)
    # a count stands for the slots where all rows are live: it is not negative
    slots, stride, first_slot = (
        (rule.counts, 0, 0) if live.slots is None else (live.slots, 1, live.first_slot)
    )
    flags = codes
    if has_outliers and not rule.by_row:
        flags = x.new_empty(width, dtype=torch.int8)
        flag_columns(x, slots, flags, None if marks is None else marks.bitmap, stride, first_slot, rule)
    elif has_outliers and marks is not None:
        flags = marks.bitmap
    elif lists:
        flags = zeroed_flags(x.device, width)
    keeps = lists or marks is not None
    made = x.new_empty(num_rows, width) if keeps and source != "x" else x
    columns = x.new_empty(width, dtype=torch.int32) if lists else None
    num_columns = x.new_empty(1, dtype=torch.int32) if lists else None
    cleared = scales if num_columns is None else num_columns
    if marks is not None and has_outliers and rule.by_row:
        cleared = marks.spent
    numbers, warps = held(width)
    launch(
        quantize_kernel,
        (num_rows,),
        (x, delta, gain, total, made, slots, flags, codes, scales, rule.counts, cleared),
        (num_rows, stride, first_slot, rule.threshold, eps),
        (
            source,
            delta is not x,
            rule.by_row,
            has_outliers,
            lists,
            marks is not None,
            keeps,
            0 if cleared is scales else len(cleared),
            levels,
            width,
            numbers,
        ),
        num_warps=warps,
        contracts=False,
    )
    if columns is not None and num_columns is not None:
        list_columns(flags, columns, num_columns)
    return Rows(codes, scales, x.dtype, made if keeps else None, columns, num_columns)
