"""The gate of the MLP in one pass: silu(gate) * up. Source: SwiGLU, arXiv 2002.05202.

gate_up_proj --[T, 2 n]--> gated_silu --[T, n]--> down_proj
"""

import torch
from torch import Tensor

from service.kernels.gated_silu import native, reference

__all__ = ["gated_silu", "gated_silu_kernel"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define("gated_silu(Tensor gate_up) -> Tensor")
library.impl("gated_silu", reference.gated_silu, "CompositeExplicitAutograd")
library.impl("gated_silu", native.gated_silu, "CPU")

if torch.cuda.is_available():
    from service.kernels.gated_silu import triton as cuda

    library.impl("gated_silu", cuda.gated_silu, "CUDA")

_gated_silu = torch.ops.halftone.gated_silu.default


def gated_silu(gate_up: Tensor, deterministic: bool = False) -> Tensor:
    """[T, 2 n], gate and up side by side -> silu(gate) * up [T, n].

    `deterministic`: a row's result, bit for bit, does not depend on how many there are.
    """
    if gate_up.is_cpu:  # past the dispatcher, which takes longer than a row's kernel
        return native.gated_silu(gate_up, deterministic)
    if gate_up.is_cuda:
        return cuda.gated_silu(gate_up)
    y: Tensor = _gated_silu(gate_up)
    return y


def gated_silu_kernel(dtype: torch.dtype, device: torch.device) -> str:
    """Name of what serves, for /version."""
    if device.type == "cuda":
        return "triton.gated_silu"
    return "native.avx512.gated_silu" if device.type == "cpu" and native.has_kernel(dtype) else "torch"
