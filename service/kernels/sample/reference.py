"""What a draw means, in plain torch; it serves every device."""

import torch
from torch import Tensor

from service.kernels.philox import uniform

MIN_TEMPERATURE = 1e-30  # below, float32 would divide by zero; the largest logit has won long before


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    """See the package. A sum is finite only where each of its parts is."""
    logits = logits.float()
    drawn = pick(scaled(logits, temperature), uniform(seeds, positions, sample_indices))
    token_ids = torch.where(temperature > 0, drawn, logits.argmax(-1))
    return torch.where(torch.isfinite(logits.sum(-1, dtype=torch.float64)), token_ids, -1)


def scaled(logits: Tensor, temperature: Tensor) -> Tensor:
    """float32 [rows, vocab], float32 [rows] -> logits over temperature with 0 as each row's largest."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=MIN_TEMPERATURE).unsqueeze(1)


def pick(scaled: Tensor, share: Tensor) -> Tensor:
    """float32 [rows, vocab], float64 [rows] in (0, 1) -> int64 [rows]: where that share of the mass ends."""
    cumulative = scaled.exp().cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative, share.unsqueeze(1) * cumulative[:, -1:], right=True).squeeze(1)
