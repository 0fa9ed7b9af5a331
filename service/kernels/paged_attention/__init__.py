"""Attention over the paged KV cache: op schemas, shape checks, registration.

K and V of a layer are each [block, kv_head, 16 tokens, head_dim]. A step's T query rows lie flat, one
sequence after another, sequences with one new token (decode) first. `write_kv` runs before
`paged_attention`, so a query finds its own key in the cache.

The implementation is plain torch and serves every device; `reference.py` is the definition it is tested
against.
"""

import torch
from torch import Tensor

from service.kernels.paged_attention.dense import attend, attention_kernel, plan_decode, write

__all__ = ["attention_kernel", "paged_attention", "plan_decode", "write_kv"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define(
    "paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
    "int[] query_starts, int[] context_lengths, int num_decode, float scale, int window, "
    "float softcap, Tensor? decode_rows, Tensor? decode_mask) -> Tensor"
)
library.define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor blocks, "
    "Tensor offsets) -> ()"
)
library.impl("paged_attention", attend, "CompositeExplicitAutograd")
library.impl("write_kv", write, "CompositeExplicitAutograd")

_paged_attention = torch.ops.halftone.paged_attention.default
_write_kv = torch.ops.halftone.write_kv.default


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: list[int],
    context_lengths: list[int],
    num_decode: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    decode_rows: Tensor | None = None,
    decode_mask: Tensor | None = None,
) -> Tensor:
    """q [T, heads, head_dim] -> [T, heads, head_dim], each row attending to its sequence up to itself.

    `block_tables` int32 [S, max blocks]; `query_starts` S + 1 rows; `context_lengths` S counts of keys,
    this step's included. `window`: newest tokens a query sees, itself included, 0 for all. `softcap`:
    scores become `softcap * tanh(score / softcap)`, 0 for none. `decode_rows` and `decode_mask` are what
    `plan_decode` returned for this step; without them they are computed here.
    """
    return _paged_attention(
        q,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        context_lengths,
        num_decode,
        scale,
        window,
        softcap,
        decode_rows,
        decode_mask,
    )


def write_kv(
    k: Tensor, v: Tensor, key_cache: Tensor, value_cache: Tensor, blocks: Tensor, offsets: Tensor
) -> None:
    """Store k and v [T, kv_heads, head_dim] at `blocks` and `offsets`, int64 [T]: slot // 16, slot % 16."""
    _write_kv(k, v, key_cache, value_cache, blocks, offsets)
