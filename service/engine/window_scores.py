"""What windows of text gave, token by token, and the figures and errors that are made of it.

evaluate --nats, KL, agreement of each row--> Scored --tell()--> Evaluated
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

from torch import Tensor

from service.messages import Evaluated, Paired, WindowScores
from service.quality.divergence import (
    agrees_on_top,
    crossed_mean,
    grouped_mean,
    kl_divergence,
    negative_log_likelihood,
)

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass
class Scored:
    """One window by prefill: a value for each computed row, of which the first `skipped` do not count."""

    skipped: int = 0
    nats: list[float] = field(default_factory=list)
    reference_nats: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agrees: list[bool] = field(default_factory=list)

    def add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        """The next rows: logits [rows, vocab] of both, int64 [rows]."""
        self.nats += negative_log_likelihood(logits, targets).tolist()
        if reference is not None:
            self.reference_nats += negative_log_likelihood(reference, targets).tolist()
            self.kl += kl_divergence(reference, logits).tolist()
            self.agrees += agrees_on_top(reference, logits).tolist()


def tell(windows: Sequence[Scored], answer: Evaluated, *, of_prefill: bool, of_reference: bool) -> None:
    """Writes into `answer` what was asked for."""

    def counting(name: str) -> list[list[float]]:
        return [getattr(window, name)[window.skipped :] for window in windows]

    nats = counting("nats")
    scores = WindowScores([len(values) for values in nats], [math.fsum(values) for values in nats])
    if of_prefill:
        answer.nll["prefill"] = math.fsum(chain.from_iterable(nats))
        answer.tokens["prefill"] = sum(scores.tokens)
        _, answer.nll_standard_error = grouped_mean(nats)
    if of_reference:
        reference, kl, agrees = counting("reference_nats"), counting("kl"), counting("agrees")
        scores.reference_nll = [math.fsum(values) for values in reference]
        scores.kl = [math.fsum(values) for values in kl]
        scores.agreeing = [int(sum(values)) for values in agrees]
        answer.kl_tokens = sum(scores.tokens)
        answer.kl_mean, answer.kl_standard_error = grouped_mean(kl)
        answer.top1_agreement, answer.top1_standard_error = grouped_mean(agrees)
        ordered = sorted(chain.from_iterable(kl))
        answer.kl_quantiles = {
            name: ordered[min(int(share * len(ordered)), len(ordered) - 1)]
            for name, share in QUANTILES.items()
        }
        answer.against_reference = paired(nats, reference)
    answer.windows = scores


def paired(
    ours: Sequence[Sequence[float]],
    base: Sequence[Sequence[float]],
    targets: Sequence[Sequence[int]] | None = None,
) -> Paired:
    """Nats by window and token, from its beginning on; what only one has scored is left out.

    `targets`: the token that each value is of, where those of one token may move together.
    """
    differences = [
        [one - other for one, other in zip(*window, strict=False)] for window in zip(ours, base, strict=True)
    ]
    if targets is None:
        found = grouped_mean(differences)
    else:
        cut = [names[: len(values)] for names, values in zip(targets, differences, strict=True)]
        found = crossed_mean(differences, cut)
    return Paired(sum(map(len, differences)), *found, sum(map(bool, differences)))
