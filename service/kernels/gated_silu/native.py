"""The gate of the MLP in C: bfloat16 on a CPU; anything else is the reference's."""

from collections.abc import Callable
from ctypes import c_char_p
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.gated_silu import reference
from service.kernels.native import Library, load

_pack = Struct("2P2q").pack  # struct gated_silu in gated_silu_avx512.c


def gated_silu(gate_up: Tensor, deterministic: bool = False) -> Tensor:
    """See the package."""
    library = load()
    if (
        library is None
        or gate_up.dtype is not torch.bfloat16
        or gate_up.dim() != 2
        or not gate_up.is_contiguous()
    ):
        return reference.gated_silu(gate_up, deterministic)
    rows, width = gate_up.shape
    if width % 2 or not width:
        return reference.gated_silu(gate_up, deterministic)
    result = gate_up.new_empty(rows, width // 2)
    _function(library)(_pack(gate_up.data_ptr(), result.data_ptr(), rows, width // 2))
    return result


def has_kernel(dtype: torch.dtype) -> bool:
    """Whether rows of this type on a CPU are served here."""
    return dtype is torch.bfloat16 and load() is not None


@cache
def _function(library: Library) -> Callable[[bytes], None]:
    return library.function("halftone_gated_silu", [c_char_p])
