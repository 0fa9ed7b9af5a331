"""What every layer's attention of one step shares, computed once."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionPlan:
    """S sequences, their queries one behind another; the first `num_decode` have one query each."""

    block_tables: Tensor  # int32 [S, max blocks], rows padded with 0
    query_starts: list[int]  # [S + 1], first query of each sequence
    context_lengths: list[int]  # [S], keys of each sequence, this step's included
    num_decode: int
    gathered: dict[int, tuple[Tensor, Tensor | None]]  # window -> cache rows of the decode, additive mask


def plan_attention(
    block_tables: Tensor,
    query_starts: list[int],
    context_lengths: list[int],
    num_decode: int,
    windows: Iterable[int],
    kv_heads: int,
    block_tokens: int,
    dtype: torch.dtype,
) -> AttentionPlan:
    """`windows`: those that the model's layers have; `dtype` of queries and cache."""
    gathered = {}
    if num_decode:
        for window in set(windows):
            gathered[window] = gather_plan(
                block_tables, context_lengths, num_decode, kv_heads, block_tokens, window, dtype
            )
    return AttentionPlan(block_tables, query_starts, context_lengths, num_decode, gathered)


def gather_plan(
    block_tables: Tensor,
    context_lengths: list[int],
    num_decode: int,
    kv_heads: int,
    block_tokens: int,
    window: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """What the gathering decode of one window needs -> (cache rows, additive mask or None).

    Rows are int64 [num_decode * kv_heads * pages]; the mask [num_decode, 1, 1, pages * 16] is None when
    every gathered token is seen by its query.
    """
    device = block_tables.device
    lengths = context_lengths[:num_decode]
    starts = [max(0, length - window) if window else 0 for length in lengths]
    pages = max(
        -(-length // block_tokens) - start // block_tokens
        for start, length in zip(starts, lengths, strict=True)
    )
    first_pages = [start // block_tokens for start in starts]
    tables = block_tables[:num_decode].long()
    if any(first_pages):
        columns = torch.tensor(first_pages, device=device)[:, None] + torch.arange(pages, device=device)
        tables = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
    else:
        tables = tables[:, :pages]
    rows = (tables[:, None, :] * kv_heads + torch.arange(kv_heads, device=device)[:, None]).flatten()
    ends = [length - page * block_tokens for page, length in zip(first_pages, lengths, strict=True)]
    begins = [start - page * block_tokens for page, start in zip(first_pages, starts, strict=True)]
    tokens = pages * block_tokens
    if all(end == tokens for end in ends) and not any(begins):
        return rows, None
    token = torch.arange(tokens, device=device)
    seen = (token < torch.tensor(ends, device=device)[:, None]) & (
        token >= torch.tensor(begins, device=device)[:, None]
    )
    mask = torch.zeros(num_decode, 1, 1, tokens, dtype=dtype, device=device)
    return rows, mask.masked_fill_(~seen[:, None, None], float("-inf"))
