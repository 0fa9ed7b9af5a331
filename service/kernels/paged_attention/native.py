"""Attention in C over the pages as they lie: one query a sequence (decode) or chunks of prompts (prefill).

It serves bfloat16 on a CPU and pages of 16 tokens. Scores, softmax and sums are float32; a prefill rounds the
weights to bfloat16 before they meet the values, as torch's own attention does. A row's result depends neither
on its neighbours nor on the number of threads nor on how its prompt was cut, bit for bit.
"""

from collections.abc import Callable
from ctypes import c_char_p, c_int64
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import Library, load
from service.kernels.paged_attention.plan import AttentionPlan

PAGE_TOKENS = 16
SPAN_TOKENS = 512  # of a decode, taken by one thread at a time: SPAN in decode_attention_avx512.c
TILE_ROWS = 32  # of a prefill, queries times heads of a group: MAX_ROWS in prefill_attention_avx512.c
_pack_decode = Struct("7P8q2d").pack  # struct decode_attention
_pack_prefill = Struct("8P8q2d").pack  # struct prefill_attention


def has_decode(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a decode on a CPU is served here."""
    return dtype is torch.bfloat16 and head_dim % 32 == 0 and head_dim <= 256 and load() is not None


def has_prefill(dtype: torch.dtype, head_dim: int, group: int) -> bool:
    """Whether a prefill on a CPU is served here; `group` query heads share a KV head."""
    return has_decode(dtype, head_dim) and head_dim % 64 == 0 and head_dim <= 128 and group <= TILE_ROWS


def fits(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether these lie in memory as the C code reads them."""
    return (
        q.is_cpu
        and key_cache.dtype is q.dtype
        and value_cache.dtype is q.dtype
        and key_cache.shape[2] == PAGE_TOKENS
        and q.is_contiguous()
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
    )


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    softcap: float,
    result: Tensor,
) -> None:
    """The decoding rows of q [T, heads, head_dim] -> the same rows of `result`.

    IndexError for a length or block outside its table; then nothing is written.
    """
    library = load()
    assert library is not None, "`has_decode` was not asked"
    sequences = plan.num_decode
    _, heads, head_dim = q.shape
    num_blocks, kv_heads = key_cache.shape[:2]
    tables = plan.block_tables.contiguous()
    table_blocks = tables.shape[1]
    spans = -(-table_blocks * PAGE_TOKENS // SPAN_TOKENS)
    if window:
        spans = min(spans, (window + SPAN_TOKENS - 2) // SPAN_TOKENS + 1)
    partials = torch.empty(sequences * heads * spans * (head_dim + 2)) if spans > 1 else None
    refused = _function(library, "halftone_decode_attention")(
        _pack_decode(
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            plan.lengths.data_ptr(),
            result.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            sequences,
            kv_heads,
            heads // kv_heads,
            head_dim,
            table_blocks,
            num_blocks,
            spans,
            window,
            scale,
            softcap,
        )
    )
    if refused:
        _refuse(plan, refused - 1)


def prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    softcap: float,
    result: Tensor,
) -> None:
    """The rows of q behind those that decode -> the same rows of `result`; errors as in `decode`."""
    library = load()
    assert library is not None, "`has_prefill` was not asked"
    _, heads, head_dim = q.shape
    num_blocks, kv_heads = key_cache.shape[:2]
    tile_queries = TILE_ROWS // (heads // kv_heads)
    tables, tiles = plan.block_tables.contiguous(), plan.tiles(tile_queries)
    refused = _function(library, "halftone_prefill_attention")(
        _pack_prefill(
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            plan.lengths.data_ptr(),
            plan.starts.data_ptr(),
            tiles.data_ptr(),
            result.data_ptr(),
            len(tiles),
            tile_queries,
            kv_heads,
            heads // kv_heads,
            head_dim,
            tables.shape[1],
            num_blocks,
            window,
            scale,
            softcap,
        )
    )
    if refused:
        _refuse(plan, int(tiles[refused - 1, 0]))


@cache
def _function(library: Library, name: str) -> Callable[[bytes], int]:
    return library.function(name, [c_char_p], c_int64)


def _refuse(plan: AttentionPlan, sequence: int) -> None:
    raise IndexError(
        f"sequence {sequence}: its {int(plan.lengths[sequence])} tokens or a block of theirs are out of range"
    )
