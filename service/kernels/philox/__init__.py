"""Philox4x32-10: random numbers that are a pure function of (key, counter), the same on every device.

sampler --uniform(seed, position, sample_index, stream)--> one number in (0, 1) a row

A batch cannot move a token, because nothing is drawn from a shared state. Source: Salmon, Moraes, Dror,
Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from service.kernels.philox.reference import philox4x32, uniform

__all__ = ["philox4x32", "uniform"]
