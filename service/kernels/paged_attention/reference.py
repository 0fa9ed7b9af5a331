"""The definition of paged attention, one query at a time, softmax in float32."""

import torch
from torch import Tensor


def paged_attention_reference(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: list[int],
    context_lengths: list[int],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """q [T, heads, head_dim] -> float32 [T, heads, head_dim]."""
    _, kv_heads, block_tokens, _ = key_cache.shape
    group = q.shape[1] // kv_heads
    result = torch.empty(q.shape, dtype=torch.float32)
    for sequence, length in enumerate(context_lengths):
        first, last = query_starts[sequence], query_starts[sequence + 1]
        for row in range(first, last):
            position = length - (last - row)
            oldest = max(0, position - window + 1) if window else 0
            tokens = range(oldest, position + 1)
            blocks = [int(block_tables[sequence, token // block_tokens]) for token in tokens]
            offsets = [token % block_tokens for token in tokens]
            for head in range(q.shape[1]):
                keys = key_cache[blocks, head // group, offsets].float()  # [tokens, head_dim]
                values = value_cache[blocks, head // group, offsets].float()
                scores = keys @ q[row, head].float() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                result[row, head] = scores.softmax(0) @ values
    return result
