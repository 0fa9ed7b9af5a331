"""Logits [rows, vocab] -> token ids [rows], on the logits' device.

runner --SamplingRows--> draw --> token ids, BAD_ROW where the model's numbers are broken

A row's token depends on its logits, its parameters and one uniform number of (seed, sample index, position),
never on its neighbours: what a step may leave out because no row asks for it changes no row that did not.
Filters are exact, and between equal logits the lower token id comes first: kernels/sample_likely.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from service.kernels.greedy import greedy
from service.kernels.sample import sample
from service.kernels.sample_likely import sample_likely

BAD_ROW = -1  # as the kernels that choose mark it
SUPPRESSED = -1e30  # a logit that never wins; whole rows of it still have a finite sum

Variant = Literal["greedy", "temperature", "full"]


@dataclass(frozen=True)
class SamplingRows:
    """Parameters of each row; all but `temperature` may be empty where the variant does not read them."""

    variant: Variant  # the least one that serves every row
    temperature: Tensor  # float32 [rows], 0 is greedy
    seeds: Tensor  # int64 [rows], 64 bits
    positions: Tensor  # int64 [rows], of the token to draw
    sample_indices: Tensor  # int64 [rows]
    top_k: Tensor  # any int [rows], 0 is off
    top_p: Tensor  # float64 [rows], 1 is off
    min_p: Tensor  # float64 [rows], 0 is off


def draw(logits: Tensor, rows: SamplingRows, suppressed: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """float32 [rows, vocab] -> int64 [rows].

    `suppressed`: rows and token ids, int64 [pairs] each, that must not be drawn. `logits` stay as they are.
    """
    if suppressed is not None:
        logits = logits.clone()
        logits[suppressed[0], suppressed[1]] = SUPPRESSED
    if rows.variant == "greedy":
        return greedy(logits)
    keys = (rows.seeds, rows.positions, rows.sample_indices)
    if rows.variant == "temperature":
        return sample(logits, rows.temperature, *keys)
    return sample_likely(logits, rows.temperature, *keys, rows.top_k, rows.top_p, rows.min_p)


@dataclass(frozen=True)
class Logprobs:
    """Under the unmodified distribution of each row."""

    chosen: Tensor  # float32 [rows]
    ranks: Tensor  # int64 [rows], 1 is the likeliest
    top_ids: Tensor  # int64 [rows, num_top], likeliest first
    top_logprobs: Tensor  # float32 [rows, num_top]

    def columns(self) -> list[Tensor]:
        return [self.chosen, self.ranks, self.top_ids, self.top_logprobs]


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """float32 [rows, vocab], int64 [rows] -> each row's token's log-probability and rank, and the top few."""
    log_probabilities = logits.log_softmax(-1)
    chosen = log_probabilities.gather(1, token_ids.unsqueeze(1))
    ranks = 1 + (log_probabilities > chosen).sum(-1)
    top = log_probabilities.topk(min(num_top, logits.shape[1]), dim=-1)
    # topk leaves the order of equals open; by id, then stably by value, it is the sampler's
    top_ids = top.indices.sort(-1).values
    top_values = log_probabilities.gather(1, top_ids)
    order = torch.sort(top_values, dim=-1, descending=True, stable=True).indices
    return Logprobs(chosen.squeeze(1), ranks, top_ids.gather(1, order), top_values.gather(1, order))
