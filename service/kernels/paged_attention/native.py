"""Attention of the decoding sequences in C: one query each, over the pages as they lie.

It serves bfloat16 on a CPU, pages of 16 tokens, head_dim a multiple of 32 up to 256. Scores, softmax and
sums are float32. A row's result depends neither on its neighbours nor on the number of threads, bit for bit.
"""

from collections.abc import Callable
from ctypes import c_char_p, c_int64
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import Library, load

PAGE_TOKENS = 16
SPAN_TOKENS = 512  # tokens that one thread takes at a time, as in decode_attention_avx512.c
MAX_HEAD_DIM = 256
_pack = Struct("7P8q2d").pack  # struct decode_attention there


def serves(q: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether `decode` can be called with these."""
    return (
        q.is_cpu
        and has_kernel(q.dtype, q.shape[-1])
        and key_cache.dtype is torch.bfloat16
        and value_cache.dtype is torch.bfloat16
        and key_cache.shape[2] == PAGE_TOKENS
        and q.is_contiguous()
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
    )


def has_kernel(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether pages of this kind on a CPU are served here."""
    return dtype is torch.bfloat16 and head_dim % 32 == 0 and head_dim <= MAX_HEAD_DIM and load() is not None


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """q [B, heads, head_dim] -> the same; tables and lengths are int32, and more than B rows may be given.

    IndexError for a length or block outside its table.
    """
    library = load()
    assert library is not None, "`serves` was not asked"
    sequences, heads, head_dim = q.shape
    num_blocks, kv_heads = key_cache.shape[:2]
    tables = block_tables if block_tables.is_contiguous() else block_tables.contiguous()
    table_blocks = tables.shape[1]
    spans = -(-table_blocks * PAGE_TOKENS // SPAN_TOKENS)
    if window:
        spans = min(spans, (window + SPAN_TOKENS - 2) // SPAN_TOKENS + 1)
    partials = torch.empty(sequences * heads * spans * (head_dim + 2)) if spans > 1 else None
    result = torch.empty_like(q)
    refused = _function(library)(
        _pack(
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tables.data_ptr(),
            lengths.data_ptr(),
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
        sequence = refused - 1
        raise IndexError(
            f"sequence {sequence}: {int(lengths[sequence])} tokens, or a block of theirs, is out of range"
        )
    return result


@cache
def _function(library: Library) -> Callable[[bytes], int]:
    return library.function("halftone_decode_attention", [c_char_p], c_int64)
