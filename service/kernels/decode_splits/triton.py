"""Splits of a decode's context, for attention over 16-bit pages and over codes: how many, and their sum.

paged_attention, coded_attention --a result and a log of its sum of weights for each split--> combine_kernel
"""

import triton
import triton.language as tl

from service.kernels.launch import await_predecessor

PROGRAMS = 528  # four for each multiprocessor of an H100: what its registers let run at once
MAX_SPLITS = 32
FIXED_SPLITS, FIXED_LEAST_TOKENS = 16, 256  # of a deterministic decode: as many splits, of at least so much


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["window"], do_not_specialize_on_alignment=["lengths_ptr"]
)
def combine_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,  # float32 [S, HEADS, SPLITS, DIM]
    logs_ptr,  # float32 [S, HEADS, SPLITS]
    lengths_ptr,  # int32 [S]
    out_ptr,  # [S, HEADS, DIM]
    window,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """The splits of one head, weighed by the softmax of their logs; which of them exist, the length tells."""
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + row // HEADS)
    first = tl.maximum(tl.where(window > 0, length - window, 0), 0)
    num_tiles = tl.cdiv(length, TILE) - first // TILE
    splits = tl.arange(0, SPLITS)
    used = splits * tl.maximum(tl.cdiv(num_tiles, SPLITS), LEAST) < num_tiles
    dims = tl.arange(0, WIDTH)
    is_dim = dims < DIM
    logs = tl.load(logs_ptr + row * SPLITS + splits, mask=used, other=float("-inf"))
    parts = tl.load(
        parts_ptr + (row * SPLITS + splits)[:, None] * DIM + dims[None, :],
        mask=used[:, None] & is_dim[None, :],
        other=0.0,
    )
    highest = tl.maximum(tl.max(logs, 0), -1e30)  # finite for a padded row, which has no split at all
    weights = tl.exp2(logs - highest)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + row * DIM + dims, result.to(out_ptr.dtype.element_ty), mask=is_dim)


def splits_of(rows: int, kv_heads: int, max_tokens: int, tile: int) -> int:
    """A power of two: as many programs as run at once, no more splits than the longest context has tiles."""
    wanted = min(MAX_SPLITS, PROGRAMS // (rows * kv_heads), max_tokens // tile)
    return 1 << max(wanted, 1).bit_length() - 1
