"""From qkv_proj to attention in one pass: norms of q and k, rotary embedding, K and V into their pages.

qkv_proj --[T, (heads + 2 kv_heads) * head_dim]--> rotary_kv --q--> paged_attention. Source: arXiv 2104.09864.
Into pages of 8-bit codes (kernels/kv_codes) K and V go with a scale for each token and head.
"""

import torch
from torch import Tensor

from service.kernels.rotary_kv import coded, native, reference

__all__ = ["rotary_kv", "rotary_kv_kernel"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define(
    "rotary_kv(Tensor qkv, Tensor? cos, Tensor? sin, Tensor positions, Tensor slots, Tensor? q_norm, "
    "Tensor? k_norm, float eps, Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor"
)
library.impl("rotary_kv", reference.rotary_kv, "CompositeExplicitAutograd")
library.impl("rotary_kv", native.rotary_kv, "CPU")

if torch.cuda.is_available():
    from service.kernels.rotary_kv import triton as cuda

    library.impl("rotary_kv", cuda.rotary_kv, "CUDA")

_rotary_kv = torch.ops.halftone.rotary_kv.default


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
    scales: Tensor | None = None,
) -> Tensor:
    """-> q [T, heads, head_dim], contiguous; K and V are written.

    `qkv` [T, (heads + 2 kv_heads) * head_dim]; `cos` and `sin` float32 [positions, head_dim] as
    model/rotary makes them, None for a layer without positions; `positions` and `slots` int64 [T];
    `q_norm` and `k_norm` [head_dim] or None; caches [block, kv_head, token, head_dim]; `scales` of their
    codes, bfloat16 [block, kv_head, token, 2], None where they hold values. Rotated in float32, rounded once.
    """
    if scales is not None:
        write = cuda.rotary_kv if qkv.is_cuda else coded.rotary_kv
        return write(qkv, cos, sin, positions, slots, q_norm, k_norm, eps, key_cache, value_cache, scales)
    if qkv.is_cpu:  # past the dispatcher, which takes longer than a row's kernel
        return native.rotary_kv(qkv, cos, sin, positions, slots, q_norm, k_norm, eps, key_cache, value_cache)
    if qkv.is_cuda:
        return cuda.rotary_kv(qkv, cos, sin, positions, slots, q_norm, k_norm, eps, key_cache, value_cache)
    q: Tensor = _rotary_kv(qkv, cos, sin, positions, slots, q_norm, k_norm, eps, key_cache, value_cache)
    return q


def rotary_kv_kernel(dtype: torch.dtype, device: torch.device, head_dim: int, is_coded: bool = False) -> str:
    """Name of what serves, for /version."""
    if device.type == "cuda":
        return "triton.rotary_kv"
    if device.type == "cpu" and native.has_kernel(dtype, head_dim):
        return "native.avx512.rotary_kv" + (", coded by torch" if is_coded else "")
    return "torch"
