"""How far a distribution over tokens is from the text, and from another one: pure functions, sums in float64.

engine/evaluate --logits--> nats a token --> Evaluated
"""

import math

from torch import Tensor

from service.kernels.divergence import kl_divergence, negative_log_likelihood

__all__ = ["agrees_on_top", "kl_divergence", "negative_log_likelihood", "paired_difference"]


def agrees_on_top(reference: Tensor, other: Tensor) -> Tensor:
    """Logits [rows, vocab] of both -> bool [rows]: is the likeliest token the same?"""
    return reference.argmax(-1) == other.argmax(-1)


def paired_difference(values: Tensor, base: Tensor) -> tuple[float, float]:
    """float64 [n] of both, of the same things in order -> mean of values - base, its standard error.

    The standard error takes the pairs as independent; a single pair says nothing of it, so it is infinite.
    """
    difference = values - base
    count = len(difference)
    error = float(difference.std(correction=1)) / math.sqrt(count) if count > 1 else math.inf
    return float(difference.mean()), error
