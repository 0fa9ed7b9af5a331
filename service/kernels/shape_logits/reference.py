"""What penalties and biases mean, in plain torch; it serves a CPU."""

import torch
from torch import Tensor

IN_PROMPT, GENERATED = 1, 2  # of an occurrence: a bit, and what one token of the answer adds
NEUTRAL = (1.0, 0.0, 0.0, 0.0)
ASKS = 3  # column of the factors


def shape_logits(
    logits: Tensor, rows: Tensor, occurrences: Tensor, factors: Tensor, bias_ids: Tensor, biases: Tensor
) -> None:
    """See the package."""
    seen = occurrences[:, : logits.shape[1]].index_select(0, rows)
    counts = seen // GENERATED
    repetition, frequency, presence, _ = factors.index_select(0, rows).unsqueeze(1).unbind(-1)  # [n, 1] each
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    shaped = torch.where(seen > 0, repeated, logits) - frequency * counts - presence * (counts > 0)
    logits.copy_(shaped).scatter_add_(1, bias_ids.index_select(0, rows), biases.index_select(0, rows))


def count_tokens(occurrences: Tensor, rows: Tensor, factors: Tensor, token_ids: Tensor) -> None:
    """See the package."""
    asks = factors[:, ASKS].index_select(0, rows) > 0
    counted = torch.where(asks & (token_ids >= 0), GENERATED, 0).to(torch.int32)
    places = rows.long() * occurrences.shape[1] + token_ids.clamp(min=0)
    occurrences.view(-1).index_add_(0, places, counted)
