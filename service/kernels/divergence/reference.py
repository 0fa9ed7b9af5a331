"""What likelihood and divergence mean, in plain torch; it serves every device and float type."""

from torch import Tensor


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """See the package."""
    return -logits.double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """See the package."""
    reference_log = reference.double().log_softmax(-1)
    difference = reference_log - other.double().log_softmax(-1)
    return (reference_log.exp() * difference).sum(-1)
