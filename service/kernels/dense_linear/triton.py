"""A linear for a few rows on CUDA, where time is the time in which the weight can be read, once.

A program streams `TILE_OUT` rows of the weight, the left operand of the tensor cores' product, so that the
rows of x fill its narrow side. Few outputs leave most of the machine idle, so the inputs are split: each
share leaves its part in scratch memory, and whoever comes last adds the parts in their order. A row's result
depends neither on who that is nor on how many rows there are.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, launch, next_power_of_2

# Where it is ahead of cuBLAS on an H100 (docs/experiments.md, section 10): long sums at more rows
MAX_ROWS, MAX_ROWS_OF_DEEP, DEEP = 16, 64, 8192
MIN_WEIGHT_BYTES = 16 << 20  # smaller ones live in the L2 cache
TILE_OUT, TILE_IN, STAGES = 64, 256, 3
PROGRAMS = 128  # at least so many, where the shape allows it: about one for each multiprocessor of an H100
MAX_SPLITS = 8
MAX_TILES = 1 << 16
LINE = 64  # values in 128 bytes
PREFETCHED = 1024  # values of each row: the stages of its pipeline, and one more


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def stream_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [num_rows, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]
    parts_ptr,  # float32 [SPLITS, num_rows, out_features]
    arrived_ptr,  # int32 [tiles], zeros before and after
    num_rows,
    in_features,
    share,  # in_features / SPLITS, an argument of its own so that the compiler sees when it divides by 16
    out_features,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    LINE: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    outputs = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    rows = tl.arange(0, ROWS)
    inputs = split * share + tl.arange(0, TILE_IN)
    weight_at = weight_ptr + outputs[:, None].to(tl.int64) * in_features + inputs[None, :]
    x_at = x_ptr + rows[None, :] * in_features + inputs[:, None]
    is_row = (rows < num_rows)[None, :]
    if IS_DEPENDENT:
        # the first tiles of the weight come into the L2 cache while the predecessor ends
        lines = tl.arange(0, PREFETCHED // LINE) * LINE
        begin = outputs[:, None].to(tl.int64) * in_features + split * share
        line_at = weight_ptr + begin + tl.minimum(lines, share - LINE)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [line_at], tl.int32, is_pure=False, pack=1
        )
    await_predecessor(IS_DEPENDENT)
    total = tl.zeros([TILE_OUT, ROWS], tl.float32)
    for _ in range(0, share, TILE_IN):
        weight = tl.load(weight_at, eviction_policy="evict_first")
        x = tl.load(x_at, mask=is_row, other=0.0)
        total = tl.dot(weight, x, total)
        weight_at += TILE_IN
        x_at += TILE_IN
    at = rows[None, :] * out_features + outputs[:, None]
    if SPLITS > 1:
        part = num_rows * out_features
        tl.store(parts_ptr + split * part + at, total, mask=is_row)
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            total = tl.load(parts_ptr + at, mask=is_row, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(parts_ptr + other * part + at, mask=is_row, other=0.0, cache_modifier=".cg")
            tl.store(arrived_ptr + tile, 0)
    else:
        is_last = True
    if is_last:
        if BIASED:
            total += tl.load(bias_ptr + outputs).to(tl.float32)[:, None]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_row)


def most_rows(weight: Tensor) -> int:
    """Up to how many rows of x it is worth it; 0 where whole tiles do not cover the weight."""
    out_features, in_features = weight.shape
    is_served = (
        weight.dtype in (torch.float16, torch.bfloat16)
        and weight.numel() * weight.element_size() >= MIN_WEIGHT_BYTES
        and out_features % TILE_OUT == 0
        and in_features % TILE_IN == 0
        and out_features <= MAX_TILES * TILE_OUT
        and weight.is_contiguous()
    )
    if not is_served:
        return 0
    return MAX_ROWS_OF_DEEP if in_features >= max(DEEP, out_features) else MAX_ROWS


def splits_of(in_features: int, out_features: int) -> int:
    """The least power of two that makes `PROGRAMS` of it, if whole tiles can be split so."""
    splits = 1
    while (
        splits < MAX_SPLITS
        and out_features // TILE_OUT * splits < PROGRAMS
        and in_features % (2 * splits * TILE_IN) == 0
    ):
        splits *= 2
    return splits


@cache
def arrivals(device: torch.device) -> Tensor:
    """How many shares of each tile are done: shared by all launches, which follow one another."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def stream_linear(x: Tensor, weight: Tensor, bias: Tensor | None, splits: int = 0) -> Tensor:
    """x [T, in], T up to its `most_rows` -> [T, out]; 0 splits: as many as fit."""
    x = x.contiguous()
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    splits = splits or splits_of(in_features, out_features)
    out = x.new_empty(num_rows, out_features)
    rows = max(16, next_power_of_2(num_rows))
    parts = out if splits == 1 else x.new_empty(splits, num_rows, out_features, dtype=torch.float32)
    launch(
        stream_kernel,
        (out_features // TILE_OUT, splits),
        (x, weight, weight if bias is None else bias, out, parts, arrivals(x.device)),
        (num_rows, in_features, in_features // splits, out_features),
        (bias is not None, splits, rows, TILE_OUT, TILE_IN, LINE, PREFETCHED),
        num_stages=STAGES,
    )
    return out
