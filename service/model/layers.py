"""The pieces of a decoder layer that are not linears: RMSNorm and the gate of the MLP."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., n] -> [..., n]: computed in float32, rounded to x's dtype, then scaled by `weight` [n].

    The rounding stands before the scaling, as the checkpoints' own code has it; torch's fused `rms_norm`
    rounds once, after it, so it is given no weight.
    """
    wide = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return wide.to(x.dtype) * weight


def gated_silu(gate_up: Tensor) -> Tensor:
    """[T, 2 n], gate and up side by side -> silu(gate) * up [T, n]."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)
