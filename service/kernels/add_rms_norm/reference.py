"""What the residual connection with its norm means, in plain torch; it serves every device and type."""

import torch.nn.functional as F
from torch import Tensor


def add_rms_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See the package. The sum is rounded to hidden's dtype before it is normed, as an addition alone would.

    The norm's second rounding stands before the scaling, as the checkpoints' own code has it; torch's fused
    `rms_norm` rounds once, after it, so it is given no weight.
    """
    total = hidden.clone() if delta is None else hidden + delta
    wide = F.rms_norm(total.float(), total.shape[-1:], None, eps)
    return total, wide.to(total.dtype) * weight
