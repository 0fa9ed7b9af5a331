"""Attention over a paged KV cache: one query a sequence (decode) or a chunk of a prompt (prefill).

decoder --plan_attention (once a step)--> AttentionPlan --paged_attention (each layer)--> y. K and V of the
step are written before (kernels/rotary_kv), so a query finds its own key in the cache.

`reference.py` is the definition, `triton.py` serves CUDA, `native.py` bfloat16 on a CPU, and plain torch
(`dense.py`; for a deterministic plan `by_page.py`) the rest.
"""

import torch
from torch import Tensor

from service.kernels.paged_attention import dense
from service.kernels.paged_attention.plan import (
    COPIED_TOKENS,
    SHORT_PROMPT_TOKENS,
    AttentionPlan,
    PromptTiles,
    decode_plan,
    mixed_plan,
    plan_attention,
)

__all__ = [
    "COPIED_TOKENS",
    "SHORT_PROMPT_TOKENS",
    "AttentionPlan",
    "PromptTiles",
    "attention_kernel",
    "decode_plan",
    "mixed_plan",
    "paged_attention",
    "plan_attention",
]

if torch.cuda.is_available():
    from service.kernels.paged_attention import triton as cuda


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """q [T, heads, head_dim] -> [T, heads, head_dim], each row attending to its sequence up to itself.

    `q` is contiguous. `window`: newest tokens a query sees, itself included, 0 for all. `softcap`: scores
    become `softcap * tanh(score / softcap)`, 0 for none. `out`: contiguous, where the result goes.
    """
    if q.is_cuda:
        return cuda.paged_attention(q, key_cache, value_cache, plan, scale, window, softcap, out)
    attended = dense.paged_attention(q, key_cache, value_cache, plan, scale, window, softcap)
    return attended if out is None else out.copy_(attended)


def attention_kernel(
    dtype: torch.dtype, device: torch.device, head_dim: int, group: int, deterministic: bool = False
) -> str:
    """Name of what serves attention without a softcap, for /version; `group` query heads share a KV head."""
    if device.type == "cuda":
        return "triton.paged_attention"
    return dense.attention_kernel(dtype, device, head_dim, group, deterministic)
