"""A decode's attention in one launch: norms and rotary embedding, K and V into their pages, attention.

decoder --qkv [S, (heads + 2 kv_heads) * head_dim]--> decode_attention --y [S, heads, head_dim]--> o_proj. For
the sequences of a step that have one new token. It does what kernels/rotary_kv and kernels/paged_attention do
one after the other, which serve prompts, and everybody whom `refusal` names.
"""

import torch
from torch import Tensor

from service.kernels.cuda import absence
from service.kernels.decode_attention.table import Row, Settings, Shape, plan, refusal, row_for
from service.kernels.decode_attention.variants import Variant
from service.kernels.paged_attention import AttentionPlan

__all__ = [
    "Row",
    "Settings",
    "Shape",
    "Variant",
    "decode_attention",
    "load",
    "plan",
    "plan_on",
    "refusal",
    "serving",
]


def plan_on(shape: Shape, device: torch.device, *, deterministic: bool = False) -> tuple[Row, ...]:
    """The plan, where it can be kept; empty elsewhere.

    A row's bits depend on how many sequences are computed with it (splits), so a deterministic step is
    served by the kernels whose order is fixed.
    """
    return () if device.type != "cuda" or deterministic or absence() else plan(shape)


def serving(shape: Shape, step: AttentionPlan) -> Variant | None:
    """What serves this step's decodes; None where there are none, or other kernels serve them."""
    if not step.num_decode:
        return None
    rows = plan_on(shape, step.lengths.device, deterministic=step.deterministic)
    return row_for(rows, step.num_decode).variant if rows else None


def decode_attention(
    variant: Variant,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    step: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """-> [S, heads, head_dim]; K and V are written at the last of each sequence's `step.lengths` tokens.

    `step` only decodes. A sequence of length 0 writes nothing and gets zeros. `scales`: of caches of codes.
    `out`: contiguous, where the result goes. Everything else as `rotary_kv` and `paged_attention`, or
    `coded_attention`, say.
    """
    from service.kernels.decode_attention import cuda

    rest = key_cache, value_cache, step, scale, window, softcap, scales
    return cuda.decode_attention(variant, qkv, cos, sin, q_norm, k_norm, eps, *rest, out)


def load(variant: Variant) -> object:
    """Compiles it for the GPU and brings it there, ahead of its first call."""
    from service.kernels.decode_attention import cuda

    return cuda.load(variant)
