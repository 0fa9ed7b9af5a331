"""Sums over a row in C, float32 on a CPU: no float64 copies of logits; anything else is the reference's.

KL = sum p ((a - max a) - (b - max b)) / sum p + log(sum q / sum p), p = e^(a - max a), q = e^(b - max b).
Of equal rows it is exactly 0, and the rounding of what cancels stays near 1e-15.
"""

from collections.abc import Callable
from ctypes import c_char_p
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.divergence import reference as plain
from service.kernels.native import load, loaded

_pack_likelihood = Struct("3P2q").pack  # struct likelihood in divergence_avx512.c
_pack_divergence = Struct("5P2q").pack  # struct divergence


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """See the package."""
    if load() is None or not _is_ours(logits):
        return plain.negative_log_likelihood(logits, targets)
    largest, sums = likelihood_sums(logits)
    chosen = logits.gather(1, targets.unsqueeze(1)).squeeze(1)
    return largest - chosen + sums.log()


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """See the package."""
    if load() is None or not (_is_ours(reference) and _is_ours(other) and reference.shape == other.shape):
        return plain.kl_divergence(reference, other)
    reference_sums, other_sums, weighted = divergence_sums(reference, other)
    return weighted / reference_sums + (other_sums / reference_sums).log()


def likelihood_sums(logits: Tensor) -> Tensor:
    """float32 [rows, vocab] -> float64 [2, rows]: the largest, sum of e^(x - largest)."""
    rows, columns = logits.shape
    outputs = torch.empty(2, rows, dtype=torch.float64)
    largest, sums = outputs
    job = _pack_likelihood(logits.data_ptr(), largest.data_ptr(), sums.data_ptr(), rows, columns)
    _function("halftone_likelihood")(job)
    return outputs


def divergence_sums(reference: Tensor, other: Tensor) -> Tensor:
    """float32 [rows, vocab] of both -> float64 [3, rows]: sum p, sum q, sum p ((a - max a) - (b - max b))."""
    rows, columns = reference.shape
    outputs = torch.empty(3, rows, dtype=torch.float64)
    pointers = [sums.data_ptr() for sums in outputs]
    job = _pack_divergence(reference.data_ptr(), other.data_ptr(), *pointers, rows, columns)
    _function("halftone_divergence")(job)
    return outputs


def _is_ours(logits: Tensor) -> bool:
    is_float32 = logits.is_cpu and logits.dtype is torch.float32
    return is_float32 and logits.dim() == 2 and logits.shape[1] > 0 and logits.is_contiguous()


@cache
def _function(name: str) -> Callable[[bytes], None]:
    return loaded().function(name, [c_char_p])
