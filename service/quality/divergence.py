"""How far a distribution over tokens is from the text, and from another one: pure functions, sums in float64.

engine/evaluate --logits--> nats a token --> Evaluated
"""

from torch import Tensor


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """[rows, vocab] of any float type, int64 [rows] -> float64 [rows], nats."""
    return -logits.double().log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """Logits [rows, vocab] of both -> float64 [rows], nats: KL(reference || other), whole vocabulary."""
    reference_log = reference.double().log_softmax(-1)
    difference = reference_log - other.double().log_softmax(-1)
    return (reference_log.exp() * difference).sum(-1)


def agrees_on_top(reference: Tensor, other: Tensor) -> Tensor:
    """Logits [rows, vocab] of both -> bool [rows]: is the likeliest token the same?"""
    return reference.argmax(-1) == other.argmax(-1)
