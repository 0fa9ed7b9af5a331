"""The gate of the MLP in one pass: silu(gate) * up. Source: SwiGLU, arXiv 2002.05202.

gate_up_proj --[T, 2 n]--> gated_silu --[T, n]--> down_proj
"""

import torch
from torch import Tensor

from service.kernels.gated_silu import reference

__all__ = ["gated_silu"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define("gated_silu(Tensor gate_up) -> Tensor")
library.impl("gated_silu", reference.gated_silu, "CompositeExplicitAutograd")

_gated_silu = torch.ops.halftone.gated_silu.default


def gated_silu(gate_up: Tensor) -> Tensor:
    """[T, 2 n], gate and up side by side -> silu(gate) * up [T, n]."""
    y: Tensor = _gated_silu(gate_up)
    return y
