"""A decode's attention on an H100: a launch of the variant that the plan has for the number of sequences.

decode_attention --qkv, pages, tables--> Call --> y [S, heads, head_dim]
"""

from ctypes import c_float, c_int, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from service.kernels import launch as launching
from service.kernels.cuda import Kernel, Launch, TensorMap, kernel_of
from service.kernels.cuda.maps import rows_map
from service.kernels.decode_attention.table import pages_of
from service.kernels.decode_attention.variants import PAGE_TOKENS, PORTABLE_SPLITS, Variant
from service.kernels.paged_attention import AttentionPlan


def load(variant: Variant) -> Kernel:
    """Compiled and on the device."""
    wide = variant.splits > PORTABLE_SPLITS
    return kernel_of(variant.program, variant.threads, variant.shared_bytes, wide_clusters=wide)


class Call:
    """A variant's arguments, in the order of the kernel's signature; every call writes them anew."""

    def __init__(self, variant: Variant, dependent: bool) -> None:
        self.variant = variant
        self.pointers = [c_void_p() for _ in range(11)]
        self.numbers = [c_int() for _ in range(3)]
        self.fractions = [c_float() for _ in range(3)]
        told: list[Any] = [TensorMap(), TensorMap(), *self.pointers, *self.numbers, *self.fractions]
        self.launch = Launch(load(variant), told, dependent=dependent)

    def __call__(
        self,
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
        window: int,
        softcap: float,
        scales: Tensor | None,
        out: Tensor | None,
    ) -> Tensor:
        variant = self.variant
        _, kv_heads, page, dim = key_cache.shape
        sequences, heads = qkv.shape[0], kv_heads * variant.group
        # the kernel checks nothing: another type or width would read what is not there
        assert (page, dim, qkv.shape[1]) == (PAGE_TOKENS, variant.dim, (heads + 2 * kv_heads) * dim)
        assert qkv.dtype == (torch.bfloat16 if variant.bf16 else torch.float16)
        assert key_cache.dtype == value_cache.dtype == pages_of(variant)
        assert (scales is not None) == (variant.codes > 0)
        for given in (key_cache, value_cache, scales, step.block_tables, step.lengths):
            assert given is None or given.is_contiguous()
        assert (q_norm is not None, softcap > 0) == (variant.normed, variant.capped)
        qkv = qkv.contiguous()
        y = qkv.new_empty(sequences, heads, dim) if out is None else out
        assert y.is_contiguous()
        tensors: tuple[Tensor | None, ...] = (
            qkv, y, cos, sin, q_norm, k_norm, key_cache, value_cache, scales,
            step.block_tables, step.lengths,
        )  # fmt: skip
        for pointer, tensor in zip(self.pointers, tensors, strict=True):
            pointer.value = None if tensor is None else tensor.data_ptr()
        numbers = (step.block_tables.shape[1], kv_heads, window)
        for number, value in zip(self.numbers, numbers, strict=True):
            number.value = value
        for fraction, amount in zip(self.fractions, (scale, softcap, eps), strict=True):
            fraction.value = amount
        for number_of_map, cached in enumerate((key_cache, value_cache)):
            rows = cached.view(-1, dim)
            if variant.codes:  # bytes, to the copy engine
                rows = rows.view(torch.int8)
            self.launch.replace(number_of_map, rows_map(rows, PAGE_TOKENS))
        blocks = sequences * kv_heads * variant.splits
        stream = torch._C._cuda_getCurrentRawStream(qkv.get_device())
        self.launch(blocks, variant.shared_bytes, stream)
        return y


@cache
def call_of(variant: Variant, dependent: bool) -> Call:
    """One for all layers: the driver copies arguments when it is called."""
    return Call(variant, dependent)


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
    window: int,
    softcap: float,
    scales: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See the package."""
    call = call_of(variant, launching.DEPENDENT)
    return call(
        qkv, cos, sin, q_norm, k_norm, eps, key_cache, value_cache, step, scale, window, softcap, scales, out
    )
