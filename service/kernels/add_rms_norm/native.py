"""The residual connection with its norm in C: bfloat16 on a CPU; anything else is the reference's.

Bit for bit the reference's numbers, but for the order in which a row's squares are summed.
"""

from collections.abc import Callable
from ctypes import c_char_p
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.add_rms_norm import reference
from service.kernels.native import Library, load

_pack = Struct("5P2qd").pack  # struct add_rms_norm in add_rms_norm_avx512.c


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the package."""
    library = load()
    if library is None or not _serves(hidden, delta, weight):
        return reference.add_rms_norm(hidden, delta, weight, eps)
    rows, columns = hidden.shape
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    _function(library)(
        _pack(
            hidden.data_ptr(),
            0 if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            total.data_ptr(),
            normed.data_ptr(),
            rows,
            columns,
            eps,
        )
    )
    return total, normed


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether rows of this type on a CPU are served here."""
    return dtype is torch.bfloat16 and load() is not None


@cache
def _function(library: Library) -> Callable[[bytes], None]:
    return library.function("halftone_add_rms_norm", [c_char_p])


def _serves(hidden: Tensor, delta: Tensor | None, weight: Tensor) -> bool:
    if hidden.dtype is not torch.bfloat16 or hidden.dim() != 2 or not hidden.is_contiguous():
        return False
    if weight.dtype is not torch.bfloat16 or weight.shape != hidden.shape[1:] or not weight.is_contiguous():
        return False
    if delta is None:
        return True
    return delta.dtype is torch.bfloat16 and delta.shape == hidden.shape and delta.is_contiguous()
