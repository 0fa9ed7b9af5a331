"""How far a distribution over tokens is from the text, and from another one: pure functions, sums in float64.

engine/evaluate --logits--> nats a token --> Evaluated
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor

from service.kernels.divergence import kl_divergence, negative_log_likelihood

__all__ = [
    "agrees_on_top",
    "crossed_mean",
    "grouped_mean",
    "kl_divergence",
    "negative_log_likelihood",
]


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


def crossed_mean(groups: Sequence[Sequence[float]], labels: Sequence[Sequence[int]]) -> tuple[float, float]:
    """`grouped_mean` of values of which those with one label move together too, whatever group they are in.

    So do the nats of a token that a text repeats: an error of its logit is the same wherever it is predicted,
    and all the more where a model predicts alike everywhere, as one of random weights does. Source: Cameron,
    Gelbach and Miller, Journal of Business & Economic Statistics 29 (2011): variances of both groupings less
    that of their intersection, and no less than either.
    """
    mean, by_group = grouped_mean(groups)
    if not math.isfinite(by_group):
        return mean, by_group
    placed = [
        (label, number, value)
        for number, (values, names) in enumerate(zip(groups, labels, strict=True))
        for value, label in zip(values, names, strict=True)
    ]
    _, by_label = grouped_mean(_gathered((label, value) for label, _, value in placed))
    _, by_both = grouped_mean(_gathered(((label, number), value) for label, number, value in placed))
    return mean, math.sqrt(max(by_group**2, by_label**2, by_group**2 + by_label**2 - by_both**2))


def _gathered(values: Iterable[tuple[object, float]]) -> list[list[float]]:
    found: defaultdict[object, list[float]] = defaultdict(list)
    for key, value in values:
        found[key].append(value)
    return list(found.values())
