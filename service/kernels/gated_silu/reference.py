"""What the gate of the MLP means, in plain torch; it serves every device and type."""

import torch.nn.functional as F
from torch import Tensor


def gated_silu(gate_up: Tensor, deterministic: bool = False) -> Tensor:
    """See the package; computed in float32 and rounded once.

    On a CPU `F.silu` rounds the numbers at the end of a thread's share in another way, and whose they are
    depends on the number of rows. `exp` has one way; it takes longer.
    """
    gate, up = gate_up.chunk(2, -1)
    wide = gate.float()
    silu = wide.neg().exp_().add_(1).reciprocal_().mul_(wide) if deterministic else F.silu(wide)
    return silu.mul_(up).to(gate_up.dtype)
