"""What filters mean and how a row draws behind them, in plain torch; it serves a CPU."""

import torch
from torch import Tensor

from service.kernels.philox import uniform
from service.kernels.sample import pick, scaled

# A full sort of the vocabulary costs twenty times a top-256, which most nuclei fit into.
NUCLEUS_WIDTHS = (256, 4096)


def sample_likely(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    sample_indices: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """See the package. A sum is finite only where each of its parts is."""
    over = scaled(logits, temperature)
    over = over.masked_fill(~kept(over, top_k.long(), top_p, min_p), -torch.inf)
    drawn = pick(over, uniform(seeds, positions, sample_indices))
    token_ids = torch.where(temperature > 0, drawn, logits.argmax(-1))
    return torch.where(torch.isfinite(logits.sum(-1)), token_ids, -1)


def kept(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """float32 [rows, vocab] with 0 as each row's largest, and each row's filters -> bool [rows, vocab]."""
    vocab_size = scaled.shape[1]
    max_kept = torch.where(top_k > 0, top_k.clamp(max=vocab_size), vocab_size)  # by top-k alone
    unlimited = max_kept == vocab_size
    nucleus = top_p < 1
    whole_mass = scaled.exp().sum(-1, dtype=torch.float64)
    for width in (*NUCLEUS_WIDTHS, vocab_size):
        width = min(width, vocab_size)
        values = scaled.topk(width, dim=-1).values
        cumulative = values.exp().cumsum(-1, dtype=torch.float64)
        mass = cumulative.gather(1, max_kept.clamp(max=width).unsqueeze(1) - 1).squeeze(1)
        target = top_p * torch.where(unlimited, whole_mass, mass)
        settled = (max_kept <= width) | (unlimited & (~nucleus | (cumulative[:, -1] >= target)))
        if width == vocab_size or settled.all():
            break
    in_nucleus = 1 + (cumulative < target.unsqueeze(1)).sum(-1)
    num_kept = torch.where(nucleus, torch.minimum(in_nucleus, max_kept), max_kept)
    smallest = values.gather(1, num_kept.clamp(max=width).unsqueeze(1) - 1)
    smallest = smallest.masked_fill((num_kept > width).unsqueeze(1), -torch.inf)
    above = scaled > smallest
    level = scaled == smallest
    room = num_kept - above.sum(-1)
    keep = above | (level & (level.cumsum(-1) <= room.unsqueeze(1)))
    return keep & (scaled >= min_p.log().to(scaled.dtype).unsqueeze(1))
