"""Paged attention without Triton: by `native.py` where it serves, else in plain torch, which gathers pages.

A page of one head is one row of the cache viewed as [block * kv_heads, 16 * head_dim], so one
`index_select` brings a batch's keys into [batch, kv_heads, tokens, head_dim]. Query heads that share a
KV head become rows of one query matrix, so nothing is repeated.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.paged_attention import by_page, native
from service.kernels.paged_attention.plan import AttentionPlan

MIN_BATCHED_PRODUCTS = 4  # sequences from which two batched products beat the fused attention on a CPU


def attention_kernel(
    dtype: torch.dtype, device: torch.device, head_dim: int, group: int, deterministic: bool = False
) -> str:
    """Name of what serves attention without a softcap on a CPU."""
    is_cpu = device.type == "cpu"
    fused = "torch.bmm by page" if deterministic else "torch.scaled_dot_product_attention"
    if is_cpu and native.has_prefill(dtype, head_dim, group):
        return "native.avx512.decode_attention, native.avx512.prefill_attention"
    if is_cpu and native.has_decode(dtype, head_dim):
        return f"native.avx512.decode_attention, {fused} in prefill"
    if not deterministic and _has_batched_products(dtype, device):
        return f"{fused}, torch.bmm from {MIN_BATCHED_PRODUCTS} decoding sequences"
    return fused


def _has_batched_products(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.bfloat16 and device.type == "cpu"


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """See the package."""
    result = torch.empty_like(q)
    head_dim, group, fits = (
        q.shape[2],
        q.shape[1] // key_cache.shape[1],
        native.fits(q, key_cache, value_cache),
    )
    if plan.num_decode:
        if fits and native.has_decode(q.dtype, head_dim):
            native.decode(q, key_cache, value_cache, plan, scale, window, softcap, result)
        elif plan.deterministic:
            by_page.paged_attention(
                q, key_cache, value_cache, plan, scale, window, softcap, result, 0, plan.num_decode
            )
        else:
            _, kv_heads, block_tokens, _ = key_cache.shape
            rows, mask = plan.gathered(window, kv_heads, block_tokens, q.dtype)
            decoding = q[: plan.num_decode]
            result[: plan.num_decode] = _decode(decoding, key_cache, value_cache, rows, mask, scale, softcap)
    if plan.num_decode == plan.num_sequences:
        return result
    if fits and native.has_prefill(q.dtype, head_dim, group):
        native.prefill(q, key_cache, value_cache, plan, scale, window, softcap, result)
        return result
    if plan.deterministic:
        sequences = plan.num_decode, plan.num_sequences
        by_page.paged_attention(q, key_cache, value_cache, plan, scale, window, softcap, result, *sequences)
        return result
    for sequence in range(plan.num_decode, plan.num_sequences):
        chunk = slice(plan.query_starts[sequence], plan.query_starts[sequence + 1])
        table, length = plan.block_tables[sequence], plan.context_lengths[sequence]
        result[chunk] = _prefill(q[chunk], key_cache, value_cache, table, length, scale, window, softcap)
    return result


def _decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """One query a sequence: q [B, heads, head_dim] -> [B, heads, head_dim]."""
    batch, heads, head_dim = q.shape
    kv_heads = key_cache.shape[1]
    keys, values = _gather(key_cache, rows, batch), _gather(value_cache, rows, batch)
    grouped = q.view(batch, kv_heads, heads // kv_heads, head_dim)
    has_products = batch >= MIN_BATCHED_PRODUCTS and _has_batched_products(q.dtype, q.device) and not softcap

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        if has_products:
            return _batched_products(grouped, keys, values, mask, scale)
        return _attention(grouped, keys, values, mask, scale, softcap)

    result = attend(keys, values)
    if mask is not None and not result.isfinite().all():
        # a broken request's keys may lie where nobody looks, and 0 times NaN is NaN
        unseen = mask.isinf().transpose(2, 3)
        result = attend(keys.masked_fill(unseen, 0), values.masked_fill(unseen, 0))
    return result.reshape(batch, heads, head_dim)


def _batched_products(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[B, kv_heads, group, head_dim] over [B, kv_heads, tokens, head_dim] as two batched products.

    torch's fused CPU attention makes one small product after another for each head of each sequence; from a
    few sequences on, two calls take half its time. Scores and weights are rounded to bf16 between them.
    """
    batch, kv_heads, group, head_dim = q.shape
    scores = torch.bmm(
        q.reshape(-1, group, head_dim), keys.view(batch * kv_heads, -1, head_dim).transpose(1, 2)
    )
    scores = scores.view(batch, kv_heads, group, -1).float().mul_(scale)
    if mask is not None:
        scores += mask
    weights = scores.softmax(-1).to(q.dtype).view(batch * kv_heads, group, -1)
    return torch.bmm(weights, values.view(batch * kv_heads, -1, head_dim)).view(q.shape)


def _prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    length: int,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """A chunk of one sequence: q [n, heads, head_dim] -> [n, heads, head_dim]; earlier keys are cached."""
    chunk, heads, _ = q.shape
    _, kv_heads, block_tokens, _ = key_cache.shape
    earlier = length - chunk
    first_page = max(0, earlier - window + 1) // block_tokens if window else 0
    pages = table[first_page : -(-length // block_tokens)].long()
    rows = (pages * kv_heads + torch.arange(kv_heads, device=q.device)[:, None]).flatten()
    tokens = length - first_page * block_tokens
    keys = _gather(key_cache, rows, 1)[:, :, :tokens]
    values = _gather(value_cache, rows, 1)[:, :, :tokens]
    queries = q.transpose(0, 1)[None]  # [1, heads, n, head_dim]
    if not earlier and not softcap and (not window or length <= window):
        result = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
        return result[0].transpose(0, 1)
    query = torch.arange(tokens - chunk, tokens, device=q.device)[:, None]
    key = torch.arange(tokens, device=q.device)
    hidden = key > query
    if window:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    if softcap:
        group = heads // kv_heads
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return _attention(queries, keys, values, mask, scale, softcap)[0].transpose(0, 1)
    result = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return result[0].transpose(0, 1)


def _gather(cache: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Pages at `rows` -> [batch, kv_heads, tokens, head_dim]."""
    _, kv_heads, block_tokens, head_dim = cache.shape
    pages = cache.view(-1, block_tokens * head_dim).index_select(0, rows)
    return pages.view(batch, kv_heads, -1, head_dim)


def _attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """[B, heads, n, head_dim] over [B, heads, tokens, head_dim], additive mask."""
    if not softcap:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale)
    scores = torch.matmul(q.float(), keys.float().transpose(-1, -2)).mul_(scale / softcap)
    scores = scores.tanh_().mul_(softcap)
    if mask is not None:
        scores = scores + mask
    return torch.matmul(scores.softmax(-1), values.float()).to(q.dtype)
