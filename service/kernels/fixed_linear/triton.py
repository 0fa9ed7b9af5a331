"""A linear on CUDA whose rows do not depend on how many there are: one order of sums for any number of rows.

Elsewhere a few rows go to dense_linear's kernel and many to cuBLAS, which cuts the inputs another way for
another number of rows. Here the weight's shape alone says how many shares the inputs are cut into. An output
is the sum of each share, added up by one instruction from its first input to its last, and then the shares in
their order. Few rows leave most of the machine idle, so each share gets a program; with many, one program
computes all shares, one behind the other. Tiles that stick out are masked, so it serves every shape.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.dense_linear.triton import MAX_TILES, arrivals
from service.kernels.launch import await_predecessor, cdiv, launch

PROGRAMS = 128  # at least so many, where the shape allows it: about one for each multiprocessor of an H100
MAX_SPLITS = 8
SPLIT_OUT = 64  # outputs of the tiles that shares are counted by


@dataclass(frozen=True)
class Tiles:
    """How a weight is walked over. `rows` is the width of the tensor cores' product: one for a type."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


FEW = Tiles(rows=64, outputs=SPLIT_OUT, inputs=64, num_warps=4, num_stages=6)
MANY = Tiles(rows=64, outputs=256, inputs=64, num_warps=8, num_stages=4)
FLOAT32 = Tiles(rows=32, outputs=SPLIT_OUT, inputs=32, num_warps=4, num_stages=2)


@triton.jit  # type: ignore[untyped-decorator]
def share_of(  # type: ignore[no-untyped-def]
    x_at, weight_at, is_row, is_output, begin, share, in_features,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
):  # fmt: skip
    """float32 [TILE_OUT, ROWS]: the products of the inputs from `begin` on, added in their order."""
    total = tl.zeros([TILE_OUT, ROWS], tl.float32)
    for start in range(begin, begin + share, TILE_IN):
        inputs = start + tl.arange(0, TILE_IN)
        if WHOLE:
            weight = tl.load(weight_at + inputs[None, :])
            x = tl.load(x_at + inputs[:, None], mask=is_row, other=0.0)
        else:
            inside = inputs < in_features
            weight = tl.load(weight_at + inputs[None, :], mask=is_output & inside[None, :], other=0.0)
            x = tl.load(x_at + inputs[:, None], mask=is_row & inside[:, None], other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def fixed_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]
    parts_ptr,  # float32 [SPLITS, num_rows, out_features], if APART
    arrived_ptr,  # int32 [blocks of rows * tiles], zeros before and after
    num_rows,
    in_features,
    share,  # in_features / SPLITS
    out_features,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    APART: tl.constexpr,  # each share has a program
    WHOLE: tl.constexpr,  # tiles cover the weight exactly
    ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    # blocks of rows follow one another, so that the weight's tile comes from memory once
    tile = tl.program_id(1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[None, :]
    outputs = (tile * TILE_OUT + tl.arange(0, TILE_OUT)).to(tl.int64)[:, None]
    is_row = rows < num_rows
    is_output = outputs < out_features
    x_at = x_ptr + rows * in_features
    weight_at = weight_ptr + outputs * in_features
    split = tl.program_id(2)
    total = share_of(
        x_at, weight_at, is_row, is_output, split * share, share, in_features, WHOLE, ROWS, TILE_OUT, TILE_IN
    )
    at = rows * out_features + outputs
    inside = is_row & is_output
    is_last = True
    if APART:
        part = num_rows.to(tl.int64) * out_features
        tl.store(parts_ptr + split * part + at, total, mask=inside)
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        place = arrived_ptr + tile * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(place, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            total = tl.load(parts_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(parts_ptr + other * part + at, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(place, 0)
    else:
        for other in tl.static_range(1, SPLITS):
            total += share_of(
                x_at, weight_at, is_row, is_output, other * share, share, in_features,
                WHOLE, ROWS, TILE_OUT, TILE_IN,
            )  # fmt: skip
    if is_last:
        if BIASED:
            total += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def splits_of(in_features: int, out_features: int, tile_in: int) -> int:
    """By the weight's shape: the least power of two that makes `PROGRAMS` of a few rows, if it can be."""
    splits, tiles = 1, cdiv(out_features, SPLIT_OUT)
    while splits < MAX_SPLITS and tiles * splits < PROGRAMS and in_features % (2 * splits * tile_in) == 0:
        splits *= 2
    return splits


def tiles_of(num_rows: int, out_features: int, dtype: torch.dtype) -> Tiles:
    """Neither changes what a row's sums are: only which program makes them."""
    if dtype == torch.float32:
        return FLOAT32
    many = cdiv(num_rows, MANY.rows) * cdiv(out_features, MANY.outputs) >= PROGRAMS
    return MANY if many else FEW


def fixed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, tiles: Tiles | None = None
) -> Tensor:
    """x [T, in] of float16, bfloat16 or float32, weight [out, in] and bias [out] of its type -> [T, out]."""
    x, weight = x.contiguous(), weight.contiguous()
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    tiles = tiles or tiles_of(num_rows, out_features, x.dtype)
    splits = splits_of(in_features, out_features, tiles.inputs)
    blocks, columns = cdiv(num_rows, tiles.rows), cdiv(out_features, tiles.outputs)
    # apart or not, the splits are added in the same order
    is_apart = splits > 1 and tiles.outputs == SPLIT_OUT and blocks * columns <= MAX_TILES
    out = x.new_empty(num_rows, out_features)
    parts = x.new_empty(splits, num_rows, out_features, dtype=torch.float32) if is_apart else out
    launch(
        fixed_kernel,
        (blocks, columns, splits if is_apart else 1),
        (x, weight, weight if bias is None else bias, out, parts, arrivals(x.device)),
        (num_rows, in_features, in_features // splits, out_features),
        (
            bias is not None,
            splits,
            is_apart,
            out_features % tiles.outputs == 0 and in_features % tiles.inputs == 0,
            tiles.rows,
            tiles.outputs,
            tiles.inputs,
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    return out
