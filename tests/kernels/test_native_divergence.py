"""Likelihood and divergence in C against their torch reference and against 80-bit sums."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels import native
from service.kernels.divergence import kl_divergence, negative_log_likelihood, reference
from service.kernels.divergence import native as divergence_native

pytestmark = pytest.mark.skipif(native.load() is None, reason=native.absence())

INF, NAN = math.inf, math.nan
LARGEST = torch.finfo(torch.float32).max
seeds = st.integers(0, 999)


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes to the reference fails."""

    def fail(*_: Tensor) -> Tensor:
        raise AssertionError("this is not for torch")

    monkeypatch.setattr(reference, "negative_log_likelihood", fail)
    monkeypatch.setattr(reference, "kl_divergence", fail)


@pytest.fixture
def torch_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes to the library fails."""
    monkeypatch.setattr(native._State, "choice", "torch")
    monkeypatch.delattr(divergence_native, "likelihood_sums")
    monkeypatch.delattr(divergence_native, "divergence_sums")


def close(got: Tensor, expected: Tensor, rtol: float, atol: float) -> bool:
    assert got.dtype == expected.dtype == torch.float64
    return torch.allclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(0, 6),
    vocab=st.integers(1, 1200),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4, 1e37]),
    seed=seeds,
)
def test_likelihood_equals_reference(num_rows: int, vocab: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(num_rows, vocab) * scale
    targets = torch.randint(0, vocab, (num_rows,))
    got = negative_log_likelihood(logits, targets)
    assert close(got, reference.negative_log_likelihood(logits, targets), 1e-13, 1e-15)


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(0, 6),
    vocab=st.integers(1, 1200),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]),
    noise=st.sampled_from([0.0, 1e-4, 0.05, 1.0, 100.0]),
    seed=seeds,
)
def test_divergence_equals_reference(
    num_rows: int, vocab: int, scale: float, noise: float, seed: int
) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(num_rows, vocab) * scale
    other = logits + torch.randn(num_rows, vocab) * noise + seed
    assert close(kl_divergence(logits, other), reference.kl_divergence(logits, other), 1e-12, 1e-13)


def exact_divergence(a: Tensor, b: Tensor) -> np.ndarray:
    """With 64 bits of mantissa, in numpy's longdouble."""
    logs = []
    for logits in (a, b):
        distance = logits.numpy().astype(np.longdouble)
        distance -= distance.max(-1, keepdims=True)
        logs.append(distance - np.log(np.exp(distance).sum(-1, keepdims=True)))
    divergence: np.ndarray = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    return divergence


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize(("noise", "rtol"), [(4e-5, 1e-5), (0.05, 1e-11), (1.0, 1e-13)])
def test_small_divergence_of_a_large_vocabulary(noise: float, rtol: float) -> None:
    """The first is about 9e-10: what cancels leaves 1e-15."""
    torch.manual_seed(0)
    logits = torch.randn(3, 49_152) * 4
    other = logits + torch.randn_like(logits) * noise
    got = kl_divergence(logits, other).numpy()
    assert np.abs(got / exact_divergence(logits, other) - 1).max() < rtol


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(1, 3000), shift=st.sampled_from([0.0, 1.0, -1024.0]), seed=seeds)
def test_equal_rows_do_not_differ(vocab: int, shift: float, seed: int) -> None:
    """Whatever is added to all logits of a row; these are multiples of 1/8, so that adding rounds nothing."""
    torch.manual_seed(seed)
    logits = torch.randint(-99, 99, (2, vocab)) / 8
    assert kl_divergence(logits, logits + shift).tolist() == [0.0, 0.0]


@pytest.mark.usefixtures("without_torch")
def test_exponential_is_within_two_units() -> None:
    """Of two columns, 0 and x, against 0 and 0: the weighted sum is e^x x, rounded once more."""
    x = torch.cat((-torch.logspace(-7, 2.84, 5000), -torch.arange(1, 400) * math.log(2) / 2))
    assert -708 < float(x.min()) < -690  # the smallest e^x that is no subnormal number
    columns = torch.stack((torch.zeros_like(x), x), 1)
    _, _, weighted = divergence_native.divergence_sums(columns, torch.zeros_like(columns))
    precise = x.numpy().astype(np.longdouble)
    expected = np.exp(precise) * precise
    error = np.abs(weighted.numpy() / expected - 1)
    assert error.max() < (2 + 1) * 2.0**-53


ROWS = {
    "plain": [1.0, 2.0, 0.0],
    "impossible": [1.0, -INF, 0.0],
    "certain": [-INF, 5.0, -INF],
    "nothing": [-INF, -INF, -INF],
    "infinite": [1.0, INF, 0.0],
    "nan": [1.0, 2.0, NAN],
    "negative nan": [-NAN, 2.0, 1.0],
    "extreme": [LARGEST, -LARGEST, 0.0],
}


@pytest.mark.usefixtures("without_torch")
@pytest.mark.parametrize("padding", [0, 14, 600])
@pytest.mark.parametrize("name", ROWS)
def test_what_is_no_number(monkeypatch: pytest.MonkeyPatch, name: str, padding: int) -> None:
    """As the reference has it, against every other row, also behind more columns; a neighbour stays whole."""
    rows = torch.tensor([ROWS[name]] * len(ROWS))
    others = torch.tensor(list(ROWS.values()))
    columns = torch.full((len(ROWS), padding), -3.0)
    rows, others = torch.cat((columns, rows), 1), torch.cat((columns, others), 1)
    targets = [torch.full((len(ROWS),), padding + place) for place in range(3)]
    got = [
        *(negative_log_likelihood(others, each) for each in targets),
        kl_divergence(rows, others),
        kl_divergence(others, rows),
    ]
    monkeypatch.undo()
    expected = [
        *(reference.negative_log_likelihood(others, each) for each in targets),
        reference.kl_divergence(rows, others),
        reference.kl_divergence(others, rows),
    ]
    for ours, wanted in zip(got, expected, strict=True):
        assert close(ours, wanted, 1e-13, 1e-13)
    assert not got[0][0].isnan()


@pytest.mark.usefixtures("without_torch")
def test_neighbours_and_threads_move_no_row() -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(2, 33, 777)
    targets = torch.randint(0, 777, (33,))
    library = native.loaded()
    library.set_threads(3)
    nats, divergence = negative_log_likelihood(logits, targets), kl_divergence(logits, other)
    library.set_threads(torch.get_num_threads())
    for row in range(33):
        one = slice(row, row + 1)
        largest, total = divergence_native.likelihood_sums(logits[one])
        assert float(largest) == float(logits[row].max())
        assert close(nats[one], largest - logits[one, targets[row]] + total.log(), 1e-15, 0)
        assert close(divergence[one], kl_divergence(logits[one], other[one]), 1e-15, 1e-16)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        negative_log_likelihood(torch.zeros(1, 20), torch.tensor([20]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_and_layouts_are_the_references(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    whole = torch.randn(30, 30)
    targets = torch.randint(0, 20, (20,))
    for logits in (whole[:20].to(dtype), whole[:20, :20], whole[:20, :20].t(), whole.to(dtype)[:20, :20]):
        other = logits.flip(0)
        nats, divergence = negative_log_likelihood(logits, targets), kl_divergence(logits, other)
        assert torch.equal(nats, reference.negative_log_likelihood(logits, targets))
        assert torch.equal(divergence, reference.kl_divergence(logits, other))
        assert torch.equal(kl_divergence(other, logits), reference.kl_divergence(other, logits))


def test_float32_against_another_type() -> None:
    logits = torch.randn(3, 20)
    assert torch.equal(
        kl_divergence(logits, logits.double()), reference.kl_divergence(logits, logits.double())
    )


@pytest.mark.usefixtures("torch_chosen")
def test_torch_serves_where_it_is_chosen() -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(2, 3, 5000)
    targets = torch.tensor([0, 7, 4999])
    assert torch.equal(
        negative_log_likelihood(logits, targets), reference.negative_log_likelihood(logits, targets)
    )
    assert torch.equal(kl_divergence(logits, other), reference.kl_divergence(logits, other))
