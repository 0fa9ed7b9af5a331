"""What the gate of the MLP means, in plain torch; it serves every device and type."""

import torch.nn.functional as F
from torch import Tensor


def gated_silu(gate_up: Tensor) -> Tensor:
    """See the package; computed in float32 and rounded once."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate.float()).mul_(up).to(gate_up.dtype)
