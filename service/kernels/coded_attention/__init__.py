"""paged_attention over 8-bit codes of K and V (kernels/kv_codes): a decode reads half of the bytes.

decoder --AttentionPlan--> coded_attention --> y. The plan is paged_attention's, and so is everything that a
row's result may depend on. Prompts read their own keys and values as codes too, those of the same step
included: so a token's result does not depend on how its prompt was cut or what was cached.

`triton.py` serves CUDA, where it unpacks the pages of prompts first, unless they are many. Elsewhere the
pages of a step's sequences are dequantized in the order of their tables, to the type of the queries, and
paged_attention serves over these: right, not fast.
"""

import torch
from torch import Tensor

from service.kernels.kv_codes import dequantized
from service.kernels.paged_attention import COPIED_TOKENS, AttentionPlan, attention_kernel, paged_attention

__all__ = ["coded_attention", "coded_attention_kernel", "workspace_bytes"]

if torch.cuda.is_available():
    from service.kernels.coded_attention import triton as cuda


def coded_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """As paged_attention; caches of codes [block, kv_head, token, head_dim], head_dim even, and their scales,
    bfloat16 [block, kv_head, token, 2]."""
    if q.is_cuda:
        return cuda.coded_attention(q, key_cache, value_cache, scales, plan, scale, window, softcap, out)
    pages = plan.block_tables.flatten().long()

    def gathered(cache: Tensor, part: int) -> Tensor:
        # as bytes: torch does not gather E4M3
        codes = cache.view(torch.int8).index_select(0, pages).view(cache.dtype)
        return dequantized(codes, scales[..., part].index_select(0, pages), q.dtype)

    keys, values = gathered(key_cache, 0), gathered(value_cache, 1)
    return paged_attention(q, keys, values, plan.over_gathered(), scale, window, softcap, out=out)


def workspace_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> int:
    """Most that prompts take while a CUDA device attends to them, with queries of this type, beside less than
    a page a prompt; 0 elsewhere."""
    if device.type != "cuda":
        return 0
    return COPIED_TOKENS * kv_heads * 2 * (head_dim * dtype.itemsize + torch.bfloat16.itemsize)


def coded_attention_kernel(
    dtype: torch.dtype, device: torch.device, head_dim: int, group: int, deterministic: bool = False
) -> str:
    """Name of what serves without a softcap, for /version."""
    if device.type == "cuda":
        return "triton.coded_attention"
    return f"torch dequantizes pages, {attention_kernel(dtype, device, head_dim, group, deterministic)}"
