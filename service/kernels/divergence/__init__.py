"""How far a distribution over tokens is from the text, and from another one; terms and sums in float64.

engine/evaluate --logits [rows, vocab]--> quality/divergence --> these --nats [rows]--> Evaluated
"""

import torch
from torch import Tensor

from service.kernels.divergence import native, reference

__all__ = ["kl_divergence", "negative_log_likelihood"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define("negative_log_likelihood(Tensor logits, Tensor targets) -> Tensor")
library.impl("negative_log_likelihood", reference.negative_log_likelihood, "CompositeExplicitAutograd")
library.impl("negative_log_likelihood", native.negative_log_likelihood, "CPU")
library.define("kl_divergence(Tensor reference, Tensor other) -> Tensor")
library.impl("kl_divergence", reference.kl_divergence, "CompositeExplicitAutograd")
library.impl("kl_divergence", native.kl_divergence, "CPU")

_negative_log_likelihood = torch.ops.halftone.negative_log_likelihood.default
_kl_divergence = torch.ops.halftone.kl_divergence.default


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """[rows, vocab] of any float type, int64 [rows] -> float64 [rows], nats.

    inf where the target's logit is -inf; NaN where a row has inf or NaN, or nothing but -inf.
    """
    nats: Tensor = _negative_log_likelihood(logits, targets)
    return nats


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Logits [rows, vocab] of both -> float64 [rows], nats: KL(reference || other), whole vocabulary.

    inf where only the other has a logit of -inf; NaN where the reference has one, or any is inf or NaN.
    """
    nats: Tensor = _kl_divergence(reference, other)
    return nats
