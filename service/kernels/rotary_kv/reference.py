"""What becomes of a token's packed q, k and v before attention, in plain torch, for every device and type."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """See the package."""
    _, kv_heads, block_tokens, head_dim = key_cache.shape
    packed = qkv.view(qkv.shape[0], -1, head_dim)
    heads = packed.shape[1] - 2 * kv_heads
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        q, k = normed(q, q_norm, eps), normed(k, k_norm, eps)
    if cos is not None and sin is not None:
        cosines, sines = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
        q, k = rotate(q, cosines, sines), rotate(k, cosines, sines)
    blocks, offsets = slots // block_tokens, slots % block_tokens
    key_cache.transpose(1, 2).index_put_((blocks, offsets), k)
    value_cache.transpose(1, 2).index_put_((blocks, offsets), v)
    return q.contiguous()


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of each head, rounded before it is scaled."""
    return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, head_dim] by float32 [T, 1, head_dim], of which the sines' first half is negated."""
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
