"""Attention over a paged KV cache: one query a sequence (decode) or a chunk of a prompt (prefill).

decoder --plan_attention (once a step)--> AttentionPlan --paged_attention (each layer)--> y. K and V of the
step are written before (kernels/rotary_kv), so a query finds its own key in the cache.

The implementation is plain torch and serves every device; `reference.py` is the definition it is tested
against.
"""

from service.kernels.paged_attention.dense import attention_kernel, paged_attention
from service.kernels.paged_attention.plan import AttentionPlan, decode_plan, plan_attention

__all__ = ["AttentionPlan", "attention_kernel", "decode_plan", "paged_attention", "plan_attention"]
