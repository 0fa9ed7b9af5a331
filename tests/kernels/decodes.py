"""Decodes over shuffled pages, and what they come to in float64: for the emulator and for a GPU.

Whatever the kernel may not use is NaN: block 0, the places behind the newest token, and its own place, which
the kernel writes; entries of a table behind a sequence's pages name blocks that do not exist. Of codes, which
are always finite, the scales are; and neighbours' values differ more in size than float16 could hold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.kernels.coded_attention import coded_attention
from service.kernels.decode_attention import Shape, Variant
from service.kernels.kv_codes import dequantized, is_coded, quantized
from service.kernels.paged_attention import AttentionPlan, decode_plan, paged_attention, plan_attention
from service.kernels.rotary_kv import rotary_kv

PAGE = 16
EPS = 1e-5
SPARE_ENTRIES = 3


@dataclass(frozen=True)
class Decodes:
    """S sequences with one new token each."""

    shape: Shape
    lengths: list[int]  # with the new token; 0 for a padded row
    window: int
    softcap: float
    qkv: Tensor  # [S, (heads + 2 kv_heads) * head_dim]
    cos: Tensor | None
    sin: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    keys: Tensor  # [blocks, kv_heads, PAGE, head_dim]
    values: Tensor
    scales: Tensor | None  # bfloat16 [blocks, kv_heads, PAGE, 2] of codes
    step: AttentionPlan

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def places(self) -> tuple[Tensor, Tensor]:
        """Block and offset of each new token."""
        last = (self.step.lengths.long() - 1).clamp(min=0)
        blocks = self.step.block_tables.long().gather(1, (last // PAGE)[:, None])[:, 0]
        return blocks, last % PAGE

    def made(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v after norms and rotation, rounded where kernels/rotary_kv rounds; q in float64."""
        shape, dim = self.shape, self.shape.head_dim
        counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        q, k, v = self.qkv.view(len(self.qkv), -1, dim).split(counts, 1)
        positions = (self.step.lengths.long() - 1).clamp(min=0)

        def rotated(x: Tensor, norm: Tensor | None) -> Tensor:
            wide = x.double()
            if norm is not None:
                factor = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
                wide = ((wide * factor).to(x.dtype) * norm).double()
            if self.cos is not None and self.sin is not None:
                cos, sin = (table[positions][:, None].double() for table in (self.cos, self.sin))
                wide = wide * cos + wide.roll(dim // 2, -1) * sin
            return wide.to(x.dtype)

        return rotated(q, self.q_norm).double(), rotated(k, self.k_norm), v

    def meant(self, part: int, blocks: Tensor) -> Tensor:
        """K (0) or V (1) of these blocks in float64."""
        cache = (self.keys, self.values)[part]
        # as bytes: torch does not gather E4M3
        pages = cache.view(torch.int8)[blocks].view(cache.dtype)
        if self.scales is not None:
            pages = dequantized(pages, self.scales[blocks][..., part])
        return pages.double()

    def kept(self, new: Tensor) -> Tensor:
        """A new K or V as attention finds it, in float64."""
        dtype = self.shape.kv_dtype
        return (dequantized(*quantized(new, dtype)) if is_coded(dtype) else new).double()

    def wanted(self, *, is_written: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """y in float64, and the new K and V [S, kv_heads, head_dim], which were written.

        `is_written`: the caches have their codes already, and these count. Where a number lies between two
        codes, which of them it becomes is the writer's.
        """
        q, k, v = self.made()
        y = torch.zeros_like(q)
        for row, length in enumerate(self.lengths):
            if not length:
                continue
            blocks = self.step.block_tables[row, : -(-length // PAGE)].long()
            oldest = max(0, length - self.window) if self.window else 0
            sides = []
            for part, new in enumerate((k, v)):
                pages = self.meant(part, blocks).transpose(0, 1).flatten(1, 2)[:, oldest:length]
                if not is_written:
                    pages[:, -1] = self.kept(new[row])
                sides.append(pages.repeat_interleave(self.shape.group, 0))
            keys, values = sides
            scores = (keys @ q[row][:, :, None])[:, :, 0] * self.scale
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            y[row] = (scores.softmax(-1)[:, None] @ values)[:, 0]
        return y, k, v


def decodes(
    shape: Shape,
    lengths: list[int],
    *,
    window: int = 0,
    softcap: float = 0.0,
    rotates: bool = True,
    wild: float = 1.0,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Decodes:
    """Random ones. A padded row's only block is block 0; cos and sin have a position more. `wild`: queries
    and values are so many times as large, and keys as small."""
    dim, kv_heads, dtype = shape.head_dim, shape.num_kv_heads, shape.dtype
    pages = [-(-length // PAGE) for length in lengths]
    num_blocks = sum(pages) + 1
    tables = torch.full((len(lengths), max(pages) + SPARE_ENTRIES), num_blocks + 7, dtype=torch.int32)
    keys, values = torch.randn(2, num_blocks, kv_heads, PAGE, dim, device=device)
    keys, values, scales = keys / wild, values * wild, None
    if is_coded(shape.kv_dtype):
        values *= 2.0 ** torch.randint(-14, 6, values.shape[:-1], device=device)[..., None]
        (keys, key_scales), (values, value_scales) = (quantized(x, shape.kv_dtype) for x in (keys, values))
        scales = torch.stack((key_scales, value_scales), -1)
        poisoned = [scales]
    else:
        keys, values = poisoned = [keys.to(dtype), values.to(dtype)]
    for cache in poisoned:
        cache[0] = float("nan")
    free = (torch.randperm(sum(pages)) + 1).int()
    for row, blocks in enumerate(free.split(pages)):
        tables[row, : len(blocks)] = blocks
        if lengths[row]:
            last = (lengths[row] - 1) % PAGE
            for cache in poisoned:
                cache[int(blocks[-1]), :, last:] = float("nan")
        else:
            tables[row, 0] = 0
    q_norm, k_norm = torch.rand(2, dim, device=device).add(0.5).to(dtype) if shape.is_normed else (None, None)
    cos, sin = torch.randn(2, max(lengths) + 1, dim, device=device) if rotates else (None, None)
    step = decode_plan(tables.to(device), torch.tensor(lengths, dtype=torch.int32, device=device))
    qkv = torch.randn(len(lengths), shape.num_heads + 2 * kv_heads, dim, device=device) * wild
    qkv[:, shape.num_heads : shape.num_heads + kv_heads] /= wild**2
    qkv = qkv.flatten(1).to(dtype)
    caches = keys, values, scales
    return Decodes(shape, lengths, window, softcap, qkv, cos, sin, q_norm, k_norm, *caches, step)


def composed(
    variant: Variant,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    keys: Tensor,
    values: Tensor,
    step: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    *,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """What the kernel does, by those that it replaces."""
    last = (step.lengths.long() - 1).clamp(min=0)
    blocks = step.block_tables.long().gather(1, last[:, None] // PAGE)[:, 0]
    slots = blocks * PAGE + last % PAGE
    q = rotary_kv(qkv, cos, sin, last, slots, q_norm, k_norm, eps, keys, values, scales)
    starts, lengths = list(range(len(qkv) + 1)), step.lengths.tolist()
    told = plan_attention(step.block_tables, starts, lengths, len(qkv))
    if scales is None:
        return paged_attention(q, keys, values, told, scale, window, softcap, out=out)
    y = coded_attention(q, keys, values, scales, told, scale, window, softcap)
    return y if out is None else out.copy_(y)
