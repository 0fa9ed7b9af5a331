"""How far a distribution over tokens is from the text, and from another one: pure functions, sums in float64.

engine/evaluate --logits--> nats a token --> Evaluated
"""

import math
from collections.abc import Sequence

from torch import Tensor

from service.kernels.divergence import kl_divergence, negative_log_likelihood

__all__ = ["agrees_on_top", "grouped_mean", "kl_divergence", "negative_log_likelihood"]


def agrees_on_top(reference: Tensor, other: Tensor) -> Tensor:
    """Logits [rows, vocab] of both -> bool [rows]: is the likeliest token the same?"""
    return reference.argmax(-1) == other.argmax(-1)


def grouped_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Values by group -> the mean of all, and its standard error.

    Groups are independent of each other, values of one group need not be. Of a single group the values have
    to count as if they were, and of a single value the error is infinite. Source: Liang and Zeger, Biometrika
    73 (1986), for a mean alone.
    """
    found = [group for group in groups if group]
    if len(found) == 1:
        found = [[value] for value in found[0]]
    sums = [(math.fsum(group), len(group)) for group in found]
    count = sum(size for _, size in sums)
    mean = math.fsum(total for total, _ in sums) / count
    if len(sums) == 1:
        return mean, math.inf
    spread = math.fsum((total - mean * size) ** 2 for total, size in sums)
    return mean, math.sqrt(spread * len(sums) / (len(sums) - 1)) / count
