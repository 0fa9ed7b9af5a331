"""The residual connection and the norm behind it in one pass: hidden + delta, and its RMSNorm.

decoder --hidden, delta--> (hidden, x), where x goes into the next linear. Source: arXiv 1910.07467.
"""

import torch
from torch import Tensor

from service.kernels.add_rms_norm import native, reference

__all__ = ["add_rms_norm", "add_rms_norm_kernel"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define("add_rms_norm(Tensor hidden, Tensor? delta, Tensor weight, float eps) -> (Tensor, Tensor)")
library.impl("add_rms_norm", reference.add_rms_norm, "CompositeExplicitAutograd")
library.impl("add_rms_norm", native.add_rms_norm, "CPU")

if torch.cuda.is_available():
    from service.kernels.add_rms_norm import triton as cuda

    library.impl("add_rms_norm", cuda.add_rms_norm, "CUDA")

_add_rms_norm = torch.ops.halftone.add_rms_norm.default


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[T, n], the same or None for nothing to add, [n] -> (hidden + delta, its RMSNorm times weight)."""
    if hidden.is_cpu:  # past the dispatcher, which takes longer than a row's kernel
        return native.add_rms_norm(hidden, delta, weight, eps)
    if hidden.is_cuda:
        return cuda.add_rms_norm(hidden, delta, weight, eps)
    return _add_rms_norm(hidden, delta, weight, eps)


def add_rms_norm_kernel(dtype: torch.dtype, device: torch.device) -> str:
    """Name of what serves, for /version."""
    if device.type == "cuda":
        return "triton.add_rms_norm"
    return "native.avx512.add_rms_norm" if device.type == "cpu" and native.has_kernel(dtype) else "torch"
