"""Student's t distribution: how far a mean of few repeats may lie from the truth by chance.

statistics, diff --degrees of freedom--> here; numbers in, numbers out
"""

import math
from functools import cache

CEILING = 1e7


def tail(t: float, degrees: int) -> float:
    """P(T > t) for t >= 0, by the finite sums for whole degrees (Abramowitz and Stegun, 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = degrees % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for n in range(1 + is_odd, degrees, 2):
        total += term
        term *= n / (n + 1) * cosine**2
    within = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return max(0.0, (1 - within) / 2)


@cache
def quantile(probability: float, degrees: int) -> float:
    """The t that chance exceeds with `probability` < 0.5, to 9 digits."""
    low, high = 0.0, 1.0
    while tail(high, degrees) > probability and high < CEILING:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if tail(middle, degrees) > probability else (low, middle)
    return high
