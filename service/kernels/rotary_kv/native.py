"""Norms of q and k, rotary embedding, and K and V into their pages, in C.

It serves bfloat16 on a CPU where head_dim is a multiple of 32 up to 256; anything else is the reference's.
"""

from collections.abc import Callable
from ctypes import c_char_p, c_int64
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.native import Library, load
from service.kernels.rotary_kv import reference

MAX_HEAD_DIM = 256
_pack = Struct("10P7qd").pack  # struct rotary_kv in rotary_kv_avx512.c


def rotary_kv(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """See the package. IndexError for a position or slot outside its table; then nothing is written."""
    library = load()
    is_turned, is_normed = cos is not None and sin is not None, q_norm is not None and k_norm is not None
    if (
        library is None
        or not _serves(qkv, positions, slots, key_cache, value_cache)
        or (is_turned and not (_is_table(cos, key_cache) and _is_table(sin, key_cache)))
        or (is_normed and not (_is_norm(q_norm, key_cache) and _is_norm(k_norm, key_cache)))
    ):
        return reference.rotary_kv(
            qkv, cos, sin, positions, slots, q_norm, k_norm, eps, key_cache, value_cache
        )
    positions, slots = positions.contiguous(), slots.contiguous()
    num_blocks, kv_heads, block_tokens, head_dim = key_cache.shape
    tokens, width = qkv.shape
    heads = width // head_dim - 2 * kv_heads
    q = qkv.new_empty(tokens, heads, head_dim)
    refused = _function(library)(
        _pack(
            qkv.data_ptr(),
            cos.data_ptr() if cos is not None and is_turned else 0,
            sin.data_ptr() if sin is not None and is_turned else 0,
            positions.data_ptr(),
            slots.data_ptr(),
            q_norm.data_ptr() if q_norm is not None and is_normed else 0,
            k_norm.data_ptr() if k_norm is not None and is_normed else 0,
            q.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
            block_tokens,
            num_blocks,
            min(cos.shape[0], sin.shape[0]) if cos is not None and sin is not None else 0,
            eps,
        )
    )
    if refused:
        token = refused - 1
        raise IndexError(
            f"token {token}: position {int(positions[token])} or slot {int(slots[token])} is out of range"
        )
    return q


def has_kernel(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether heads of this kind on a CPU are served here."""
    return dtype is torch.bfloat16 and head_dim % 32 == 0 and head_dim <= MAX_HEAD_DIM and load() is not None


@cache
def _function(library: Library) -> Callable[[bytes], int]:
    return library.function("halftone_rotary_kv", [c_char_p], c_int64)


def _serves(qkv: Tensor, positions: Tensor, slots: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    cache_shape, bfloat16, int64 = key_cache.shape, torch.bfloat16, torch.int64
    head_dim = cache_shape[3]
    return (
        qkv.dtype is bfloat16
        and key_cache.dtype is bfloat16
        and value_cache.dtype is bfloat16
        and positions.dtype is int64
        and slots.dtype is int64
        and qkv.dim() == 2
        and qkv.is_contiguous()
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
        and head_dim % 32 == 0
        and head_dim <= MAX_HEAD_DIM
        and value_cache.shape == cache_shape
        and qkv.size(1) % head_dim == 0
        and qkv.size(1) > 2 * cache_shape[1] * head_dim
        and positions.numel() == slots.numel() == qkv.size(0)
    )


def _is_table(table: Tensor | None, cache: Tensor) -> bool:
    if table is None or table.dtype is not torch.float32:
        return False
    return table.is_contiguous() and table.shape[1] == cache.shape[3]


def _is_norm(weight: Tensor | None, cache: Tensor) -> bool:
    if weight is None or weight.dtype is not torch.bfloat16:
        return False
    return weight.is_contiguous() and weight.shape == cache.shape[3:]
