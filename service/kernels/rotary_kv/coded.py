"""The same without Triton into a cache of 8-bit codes: written as values into pages for this step alone, then
coded in torch. This is also the definition that the Triton kernel is held against."""

import torch
from torch import Tensor

from service.kernels.kv_codes import quantized
from service.kernels.rotary_kv import native, reference


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
    scales: Tensor,
) -> Tensor:
    """See the package; what is coded was rounded to qkv's type before."""
    _, kv_heads, block_tokens, head_dim = key_cache.shape
    tokens = qkv.shape[0]
    shape = (2, -(-tokens // block_tokens), kv_heads, block_tokens, head_dim)
    keys, values = torch.empty(shape, dtype=qkv.dtype, device=qkv.device)
    fresh = torch.arange(tokens, device=qkv.device)
    rotate = native.rotary_kv if qkv.is_cpu else reference.rotary_kv
    q = rotate(qkv, cos, sin, positions, fresh, q_norm, k_norm, eps, keys, values)
    places = slots // block_tokens, slots % block_tokens
    for part, (cache, pages) in enumerate(((key_cache, keys), (value_cache, values))):
        written = pages.transpose(1, 2).flatten(0, 1)[:tokens]  # [T, kv_heads, head_dim]
        codes, found = quantized(written, cache.dtype)
        # as bytes: torch does not place E4M3 by index
        cache.view(torch.int8).transpose(1, 2).index_put_(places, codes.view(torch.int8))
        scales[..., part].transpose(1, 2).index_put_(places, found)
    return q
