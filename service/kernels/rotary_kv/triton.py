"""From qkv_proj to attention on CUDA: one program for a few heads of a token, whichever of q, k, v they are.

A head is held as its two halves, which is what the rotation mixes. K and V are written as they are or,
CODES, as 8-bit codes and their scales (kernels/kv_codes).
"""

import triton
import triton.language as tl
from torch import Tensor

from service.kernels.kv_codes.triton import codes_of, quantized
from service.kernels.launch import await_predecessor, cdiv, launch, next_power_of_2

HEADS = 8  # of one program


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])  # type: ignore[untyped-decorator]
def rotary_kv_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [T, Q_HEADS + 2 * KV_HEADS, DIM]
    cos_ptr,  # float32 [positions, DIM]
    sin_ptr,
    positions_ptr,  # int64 [T]
    slots_ptr,
    q_norm_ptr,  # [DIM]
    k_norm_ptr,
    q_ptr,  # [T, Q_HEADS, DIM]
    keys_ptr,  # [blocks, KV_HEADS, PAGE, DIM]
    values_ptr,
    scales_ptr,  # bfloat16 [blocks, KV_HEADS, PAGE, 2], K's and V's, or anything without CODES
    eps,
    ROTATES: tl.constexpr,
    NORMS: tl.constexpr,
    CODES: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, COLUMNS)
    is_column = columns < DIM // 2
    is_q = heads < Q_HEADS
    is_v = heads >= Q_HEADS + KV_HEADS
    inside = (heads < Q_HEADS + 2 * KV_HEADS)[:, None] & is_column[None, :]
    source = qkv_ptr + (token * (Q_HEADS + 2 * KV_HEADS) + heads)[:, None] * DIM + columns[None, :]
    left = tl.load(source, mask=inside, other=0.0)
    right = tl.load(source + DIM // 2, mask=inside, other=0.0)
    a, b = left.to(tl.float32), right.to(tl.float32)
    if NORMS:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DIM + eps)[:, None]
        q_left = tl.load(q_norm_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        k_left = tl.load(k_norm_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        q_right = tl.load(q_norm_ptr + DIM // 2 + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        k_right = tl.load(k_norm_ptr + DIM // 2 + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        a = (a * scale).to(left.dtype).to(tl.float32) * tl.where(is_q[:, None], q_left, k_left)
        b = (b * scale).to(left.dtype).to(tl.float32) * tl.where(is_q[:, None], q_right, k_right)
        a, b = a.to(left.dtype).to(tl.float32), b.to(left.dtype).to(tl.float32)
    if ROTATES:
        table = tl.load(positions_ptr + token) * DIM + columns
        cos_left = tl.load(cos_ptr + table, mask=is_column, other=0.0)[None, :]
        cos_right = tl.load(cos_ptr + table + DIM // 2, mask=is_column, other=0.0)[None, :]
        sin_left = tl.load(sin_ptr + table, mask=is_column, other=0.0)[None, :]
        sin_right = tl.load(sin_ptr + table + DIM // 2, mask=is_column, other=0.0)[None, :]
        a, b = a * cos_left + b * sin_left, b * cos_right + a * sin_right
    if NORMS or ROTATES:
        left = tl.where(is_v[:, None], left, a.to(left.dtype))
        right = tl.where(is_v[:, None], right, b.to(left.dtype))
    slot = tl.load(slots_ptr + token)
    target = (token * Q_HEADS + heads)[:, None] * DIM + columns[None, :]
    tl.store(q_ptr + target, left, mask=is_q[:, None] & inside)
    tl.store(q_ptr + target + DIM // 2, right, mask=is_q[:, None] & inside)
    kv_heads = (heads - Q_HEADS) % KV_HEADS
    place = ((slot // PAGE) * KV_HEADS + kv_heads) * PAGE + slot % PAGE
    target = place[:, None] * DIM + columns[None, :]
    is_k = (heads >= Q_HEADS) & (heads < Q_HEADS + KV_HEADS)
    if CODES:
        left, right, scales = quantized(left, right, CODES)
        is_kv = (heads >= Q_HEADS) & (heads < Q_HEADS + 2 * KV_HEADS)
        tl.store(scales_ptr + 2 * place + is_v, scales, mask=is_kv)
    tl.store(keys_ptr + target, left, mask=is_k[:, None] & inside)
    tl.store(keys_ptr + target + DIM // 2, right, mask=is_k[:, None] & inside)
    tl.store(values_ptr + target, left, mask=is_v[:, None] & inside)
    tl.store(values_ptr + target + DIM // 2, right, mask=is_v[:, None] & inside)


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
    """See the package; rounded where the reference rounds."""
    _, kv_heads, page, head_dim = key_cache.shape
    qkv = qkv.contiguous()
    tokens, width = qkv.shape
    all_heads = width // head_dim
    q_heads = all_heads - 2 * kv_heads
    q = qkv.new_empty(tokens, q_heads, head_dim)
    columns = next_power_of_2(head_dim // 2)
    table = (qkv, qkv) if cos is None or sin is None else (cos, sin)
    norms = (qkv, qkv) if q_norm is None or k_norm is None else (q_norm, k_norm)
    launch(
        rotary_kv_kernel,
        (tokens, cdiv(all_heads, HEADS)),
        (qkv, *table, positions, slots, *norms, q, key_cache, value_cache, q if scales is None else scales),
        (eps,),
        (
            cos is not None, q_norm is not None, codes_of(key_cache.dtype), q_heads, kv_heads, head_dim, page,
            columns, HEADS,
        ),
        num_warps=2,
    )  # fmt: skip
    return q
