"""Likelihood and divergence against sums written out in Python's own floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.quality.divergence import (
    agrees_on_top,
    crossed_mean,
    grouped_mean,
    kl_divergence,
    negative_log_likelihood,
)

numbers = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)


def softmax(logits: list[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(x - largest) for x in logits]
    return [weight / math.fsum(weights) for weight in weights]


@given(numbers, st.integers(0, 4))
def test_negative_log_likelihood(logits: list[float], target: int) -> None:
    got = negative_log_likelihood(torch.tensor([logits, logits]), torch.tensor([target, 0]))
    assert got.dtype == torch.float64
    assert got[0].item() == pytest.approx(-math.log(softmax(logits)[target]), rel=1e-9, abs=1e-12)


@given(numbers, numbers)
def test_kl_divergence_has_a_direction(reference: list[float], other: list[float]) -> None:
    p, q = softmax(reference), softmax(other)
    wanted = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    got = kl_divergence(torch.tensor([reference]), torch.tensor([other]))
    assert got.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_kl_of_small_differences_survives() -> None:
    """A difference of 1e-4 in one logit gives p(1-p) 1e-8 / 2: float32 would round it away."""
    reference = torch.zeros(1, 4, dtype=torch.float64)
    other = reference.clone()
    other[0, 0] = 1e-4
    assert kl_divergence(reference, other).item() == pytest.approx(0.25 * 0.75 * 1e-8 / 2, rel=1e-3)


def test_agreement_on_the_likeliest_token() -> None:
    one = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    other = torch.tensor([[0.0, 9.0, 8.0], [5.0, 6.0, 0.0]])
    assert agrees_on_top(one, other).tolist() == [True, False]


@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=2, max_size=20))
def test_groups_of_one_size_are_their_means(groups: list[list[float]]) -> None:
    """As many independent values as there are groups, however alike those of a group are."""
    mean, standard_error = grouped_mean(groups)
    means = np.mean(groups, 1)
    assert mean == pytest.approx(np.mean(means), rel=1e-9, abs=1e-9)
    assert standard_error == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(groups)), rel=1e-9, abs=1e-9)
    repeated = grouped_mean([group * 5 for group in groups])
    assert repeated == pytest.approx((mean, standard_error), rel=1e-9, abs=1e-9)


def test_groups_count_by_their_size() -> None:
    """(1 + 1 + 4) / 3 = 2; residuals 2 - 2 * 2 and 4 - 2; sqrt(8 * 2 / 1) / 3."""
    assert grouped_mean([[1.0, 1.0], [], [4.0]]) == (2.0, pytest.approx(4 / 3))


def test_one_group_stands_for_its_values() -> None:
    assert grouped_mean([[1.0, 2.0, 6.0], []]) == (3.0, pytest.approx((14 / 2 / 3) ** 0.5))
    assert grouped_mean([[3.0]]) == (3.0, math.inf)


def test_a_label_of_its_own_each_leaves_the_groups_error() -> None:
    groups = [[1.0, 2.0], [4.0, 6.0], [0.0, 3.0]]
    assert crossed_mean(groups, [[0, 1], [2, 3], [4, 5]]) == pytest.approx(grouped_mean(groups))


def test_what_repeats_in_all_groups_counts_once() -> None:
    """Two tokens, each predicted wrong by the same in every window: nothing is known but two values."""
    groups = [[1.0, 1.0, 3.0, 3.0]] * 8
    assert grouped_mean(groups) == (2.0, 0.0)
    assert crossed_mean(groups, [[7, 7, 9, 9]] * 8) == pytest.approx(grouped_mean([[1.0], [3.0]]))
    assert crossed_mean([[3.0]], [[7]]) == (3.0, math.inf)


def test_errors_that_belong_to_tokens_are_covered() -> None:
    """Values are their token's own error, tokens as often as 1 / rank: 95 % of means within two errors."""
    random = np.random.default_rng(0)
    shares = 1 / np.arange(1, 400)
    covered = {"groups": 0, "both": 0}
    for _ in range(200):
        errors = random.normal(size=399)
        tokens = random.choice(399, size=(8, 256), p=shares / shares.sum())
        groups = errors[tokens].tolist()
        for name, (mean, error) in (
            ("groups", grouped_mean(groups)),
            ("both", crossed_mean(groups, tokens.tolist())),
        ):
            covered[name] += abs(mean) < 2 * error
    assert covered["groups"] < 120
    assert covered["both"] > 160
