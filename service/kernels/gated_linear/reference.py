"""What gate_up_proj and the gate behind it mean, in plain torch; it serves every device and type."""

import torch.nn.functional as F
from torch import Tensor

from service.kernels.gated_silu.reference import gated_silu


def gated_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in], weight [2 n, in], gates over ups -> silu(gate) * up [T, n]; both are rounded first."""
    return gated_silu(F.linear(x, weight))
