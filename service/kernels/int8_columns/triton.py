"""Which columns of rows have outliers, on CUDA: a batch's are searched for, and lists are made of flags.

int8_rows --x--> flag_columns --flags--> rows of codes --flags--> list_columns --> int8_linear
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.int8_rows import OutlierRule
from service.kernels.launch import await_predecessor, cdiv, launch

TILE_COLUMNS, TILE_ROWS = 64, 16  # of the search for a batch's outlier columns
TILE_LISTED = 1024


@triton.jit
def in_float16(x):  # type: ignore[no-untyped-def]
    """What bitsandbytes sees of it."""
    return x.to(tl.float32).to(tl.float16).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def bits_of(flags, WORDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each 32 flags -> int32 [WORDS]."""
    apart = tl.reshape(flags.to(tl.int32), [WORDS, 32])
    return tl.sum(apart << tl.arange(0, 32)[None, :], 1)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["num_rows", "slot_stride", "first_slot"], do_not_specialize_on_alignment=["slots_ptr"]
)
def flag_columns_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, WIDTH]
    slots_ptr,  # int64 [num_rows], or one number for all
    flags_ptr,  # int8 [WIDTH]
    bitmap_ptr,  # int32 [words], if MARKS
    num_rows,
    slot_stride,  # 1, or 0
    first_slot,  # rows with slots below are padding
    threshold,
    MARKS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """1 for a column in which any live row reaches the threshold."""
    await_predecessor(IS_DEPENDENT)
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    inside = columns < WIDTH
    found = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.int32)
    for first in range(0, num_rows, TILE_ROWS):
        rows = first + tl.arange(0, TILE_ROWS)
        read = rows < num_rows
        read &= tl.load(slots_ptr + rows * slot_stride, mask=read, other=0) >= first_slot
        at = x_ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        x = tl.load(at, mask=read[:, None] & inside[None, :], other=0.0)
        found |= (tl.abs(in_float16(x)) >= threshold).to(tl.int32)
    flags = tl.max(found, 0)
    tl.store(flags_ptr + columns, flags.to(tl.int8), mask=inside)
    if MARKS:
        words = tl.program_id(0) * (TILE_COLUMNS // 32) + tl.arange(0, TILE_COLUMNS // 32)
        tl.store(bitmap_ptr + words, bits_of(flags, TILE_COLUMNS // 32))


@triton.jit  # type: ignore[untyped-decorator]
def list_columns_kernel(  # type: ignore[no-untyped-def]
    flags_ptr,  # int8 [WIDTH], zeros afterwards
    columns_ptr,  # int32 [WIDTH]
    num_columns_ptr,  # int32 [1]
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """The flagged columns. A tile's stand together, tiles in any order: exact sums do not depend on it."""
    await_predecessor(IS_DEPENDENT)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = columns < WIDTH
    flags = tl.load(flags_ptr + columns, mask=inside, other=0).to(tl.int32)
    num_found = tl.sum(flags, 0)
    if num_found > 0:
        first = tl.atomic_add(num_columns_ptr, num_found, sem="relaxed")
        tl.store(columns_ptr + first + tl.cumsum(flags, 0) - 1, columns, mask=flags > 0)
        tl.store(flags_ptr + columns, tl.zeros([TILE], tl.int8), mask=inside)


_flags: dict[torch.device, Tensor] = {}


def zeroed_flags(device: torch.device, width: int) -> Tensor:
    """int8 [at least width]: zeros but for a quantization under way; shared, as these follow one another."""
    if device not in _flags or len(_flags[device]) < width:
        _flags[device] = torch.zeros(max(width, 1 << 16), dtype=torch.int8, device=device)
    return _flags[device]


def flag_columns(
    x: Tensor,
    slots: Tensor,
    flags: Tensor,
    bitmap: Tensor | None,
    slot_stride: int,
    first_slot: int,
    rule: OutlierRule,
) -> None:
    """Of x [T, in] to flags int8 [in], and to the bits of int32 [words]; padding flags nothing."""
    num_rows, width = x.shape
    launch(
        flag_columns_kernel,
        (cdiv(width, TILE_COLUMNS),),
        (x, slots, flags, flags if bitmap is None else bitmap),
        (num_rows, slot_stride, first_slot, rule.threshold),
        (bitmap is not None, width, TILE_ROWS, TILE_COLUMNS),
    )


def list_columns(flags: Tensor, columns: Tensor, num_columns: Tensor) -> None:
    """Flags int8 [at least in] -> columns int32 [in] and how many, int32 [1], which was 0."""
    width = len(columns)
    launch(
        list_columns_kernel,
        (cdiv(width, TILE_LISTED),),
        (flags, columns, num_columns),
        (),
        (width, TILE_LISTED),
    )
