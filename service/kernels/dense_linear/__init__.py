"""x @ weight.T + bias for unquantized weights: packed once on a CPU; on CUDA torch's own, but for a few rows.

Given a plain weight, torch lets oneDNN copy it into blocks on every call. Packed at load, a step of few rows
takes about two thirds of the time, and the bytes are the same: bfloat16 for our own kernel (native.py) where
it serves, else for oneDNN. In float32 and in our own bfloat16 a row's result does not depend on how many rows
are computed with it, bit for bit, so a batch cannot move a greedy token. On CUDA that is so where a linear is
bound as `deterministic` (kernels/fixed_linear).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from service.kernels.cuda import absence
from service.kernels.dense_linear import native, widened
from service.kernels.dense_linear.few_rows import Row, Variant, plan
from service.kernels.fixed_linear import fixed_linear

__all__ = [
    "Row",
    "Variant",
    "bind_linear",
    "dense_linear",
    "is_row_invariant",
    "linear_kernel",
    "load",
    "pack_onednn",
    "pack_weight",
    "packed_bytes",
    "plan",
    "plan_of",
    "unpack_weight",
]

if torch.cuda.is_available():
    from service.kernels.dense_linear import triton

_reorder = torch.ops.mkldnn._reorder_linear_weight.default
_linear = torch.ops.mkldnn._linear_pointwise.default
_nbytes = torch.ops.mkldnn._nbytes.default


def pack_weight(weight: Tensor) -> Tensor:
    """[out, in] -> the same weight as `dense_linear` wants it: in blocks, an opaque oneDNN tensor, or itself.

    float32 and bfloat16 on a CPU are packed; float16, other devices, and CPUs or builds of torch that lack
    oneDNN (or its bfloat16) where our own kernel does not serve either, keep the plain weight.
    """
    return native.pack(weight) if native.fits(weight) else pack_onednn(weight)


def pack_onednn(weight: Tensor) -> Tensor:
    """[out, in] -> an opaque oneDNN tensor, or itself."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return weight
    if weight.dtype == torch.bfloat16:
        supported = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    else:
        supported = weight.dtype == torch.float32
    return _reorder(weight.contiguous(), None) if supported else weight


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] -> [T, out]; `weight` from `pack_weight`, `bias` [out]."""
    if x.is_cuda and x.shape[0] <= triton.most_rows(weight):
        return triton.stream_linear(x, weight, bias)
    if native.is_packed(weight):
        return native.linear(weight, bias)(x)
    if not weight.is_mkldnn:
        return widened.linear(x, weight, bias)
    if x.shape[0] == 1 and x.dtype == torch.float32:
        # oneDNN splits long sums another way for one row than for many; as two rows the sum stays the same
        return _linear(x.expand(2, -1).contiguous(), weight, bias, "none", [], "")[:1]
    return _linear(x, weight, bias, "none", [], "")


def bind_linear(
    weight: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
) -> Callable[[Tensor], Tensor] | None:
    """`dense_linear` of this weight for a layer that calls it often; None where nothing can be prepared."""
    if deterministic and weight.is_cuda:
        return partial(fixed_linear, weight=weight, bias=bias)
    if rows := plan_of(weight):
        from service.kernels.dense_linear.cuda import Bound

        return Bound(weight, bias, rows)
    return native.linear(weight, bias) if native.is_packed(weight) else None


def plan_of(weight: Tensor) -> tuple[Row, ...]:
    """Of our kernel in CUDA C++ (few_rows.py); empty where it does not serve this weight, or cannot."""
    if not weight.is_cuda or absence() or not weight.is_contiguous():
        return ()
    out_features, in_features = weight.shape
    return plan(out_features, in_features, weight.dtype)


def load(variant: Variant) -> object:
    """Compiles it for the GPU and brings it there, ahead of its first call."""
    from service.kernels.dense_linear import cuda

    return cuda.load(variant)


def unpack_weight(weight: Tensor) -> Tensor:
    """The plain [out, in] again, bit for bit."""
    if native.is_packed(weight):
        return native.unpack(weight)
    return weight.to_dense() if weight.is_mkldnn else weight


def is_row_invariant(weight: Tensor, *, deterministic: bool = False) -> bool:
    """Does a row's result, bit for bit, not depend on the rows that are computed with it?"""
    if weight.is_cuda:
        return deterministic
    return native.is_packed(weight) or (weight.is_mkldnn and weight.dtype is torch.float32)


def linear_kernel(weight: Tensor, *, deterministic: bool = False) -> str:
    """Name of what `bind_linear` or else `dense_linear` runs for this weight."""
    if deterministic and weight.is_cuda:
        return "triton.fixed_linear"
    if rows := plan_of(weight):
        return f"cuda.dense_stream up to {rows[-1].max_rows} rows, torch.linear"
    if weight.is_cuda and (most := triton.most_rows(weight)):
        return f"triton.stream_linear up to {most} rows, torch.linear"
    if native.is_packed(weight):
        return "native.avx512.dense_linear"
    return "onednn.packed_linear" if weight.is_mkldnn else "torch.linear"


def packed_bytes(weight: Tensor) -> int:
    """Bytes that the weight holds, blocks rounded up included."""
    return int(_nbytes(weight)) if weight.is_mkldnn else weight.numel() * weight.element_size()
