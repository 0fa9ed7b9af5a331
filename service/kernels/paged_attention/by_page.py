"""Attention of a deterministic plan on a CPU where no C kernel serves: by pages of queries, in float32.

torch's products may add in another order for another shape. Here the shape of a product follows from the page
alone: all sixteen queries of it, those of other steps as zeros, over every key from the first that the page
may see to its end, those not yet written as zeros. So a query is computed in the same products at the same
place, whichever step it comes in, whatever comes with it, and in a decode as in a prefill.
"""

import torch
from torch import Tensor

from service.kernels.paged_attention.plan import AttentionPlan


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int,
    softcap: float,
    result: Tensor,
    first_sequence: int,
    end_sequence: int,
) -> None:
    """The rows of q [T, heads, head_dim] of some sequences -> the same rows of `result`."""
    page_tokens = key_cache.shape[2]
    for sequence in range(first_sequence, end_sequence):
        first_row, end_row = plan.query_starts[sequence : sequence + 2]
        length, table = plan.context_lengths[sequence], plan.block_tables[sequence]
        position, row = length - (end_row - first_row), first_row
        while row < end_row:
            page, offset = divmod(position, page_tokens)
            count = min(page_tokens - offset, end_row - row)
            queries = q.new_zeros(page_tokens, *q.shape[1:])
            queries[offset : offset + count] = q[row : row + count]
            found = attend_page(queries, key_cache, value_cache, table, page, length, scale, window, softcap)
            result[row : row + count] = found[offset : offset + count]
            row, position = row + count, position + count


def attend_page(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    page: int,
    length: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """All queries of a page, q [16, heads, head_dim] -> float32 of the same shape."""
    page_tokens, heads, head_dim = q.shape
    kv_heads = key_cache.shape[1]
    first_page = max(0, page * page_tokens - window + 1) // page_tokens if window else 0
    blocks = table[first_page : page + 1].long()
    tokens = torch.arange(first_page * page_tokens, (page + 1) * page_tokens, device=q.device)
    unwritten = (tokens >= length)[:, None]

    def gathered(cache: Tensor) -> Tensor:
        """[kv_heads, tokens, head_dim]; what is not written yet may be anything."""
        pages = cache[blocks].transpose(0, 1).reshape(kv_heads, -1, head_dim)
        return pages.float().masked_fill(unwritten, 0)

    keys, values = gathered(key_cache), gathered(value_cache)
    # the query heads of a KV head are rows of one product
    grouped = (
        q.float().view(page_tokens, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    )
    scores = torch.bmm(grouped, keys.transpose(1, 2)).mul_(scale)
    if softcap:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    positions = tokens[-page_tokens:, None]
    hidden = tokens > positions
    if window:
        hidden |= tokens <= positions - window
    by_query = scores.view(kv_heads, page_tokens, -1, tokens.numel())
    weights = by_query.masked_fill_(hidden[:, None], float("-inf")).softmax(-1)
    y = torch.bmm(weights.view(scores.shape), values)
    return y.view(kv_heads, page_tokens, -1, head_dim).transpose(0, 1).reshape(page_tokens, heads, head_dim)
