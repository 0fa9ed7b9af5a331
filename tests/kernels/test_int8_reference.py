"""LLM.int8() by row in torch, against numbers worked out by hand and float64 of what codes mean."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from service.kernels.int8_linear import reference
from service.precision.bitsandbytes_import import bitsandbytes

SIXTEEN_BITS = 2.0**-15  # of the largest outlier of a row: half a step of its fine codes


def weight_of(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    codes, scales, _ = bitsandbytes.int8_vectorwise_quant(weight.half())
    return codes, scales


def test_a_row_by_hand() -> None:
    """127, -1 and 0.5 of a row whose largest regular value is 5.08 are 127 / 25 / 12.5 steps of 0.04."""
    codes = torch.tensor([[127, 0, 0, 0], [0, 127, 0, 0], [0, 0, 127, 0], [0, 0, 0, 127]], dtype=torch.int8)
    x = torch.tensor([[127, -1, 0.51, 5.078125]])
    y = reference.linear(x, codes, torch.full((4,), 1.0), torch.tensor([0, 0, 0, 10.0]), 6.0)
    step = 5.078125 / 127
    torch.testing.assert_close(y, torch.tensor([[127, -25 * step, 13 * step, 15.078125]]), rtol=1e-6, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 9),
    in_features=st.integers(2, 70),
    spread=st.floats(0, 4),
    threshold=st.sampled_from([0.5, 3.3, 6.0]),
)
def test_outliers_are_within_sixteen_bits(
    seed: int, rows: int, in_features: int, spread: float, threshold: float
) -> None:
    """The regular share is that of bitsandbytes' codes of each row alone; both ways to compute it are one."""
    generator = torch.Generator().manual_seed(seed)
    codes, scales = weight_of(12, in_features)
    x = torch.randn(rows, in_features, generator=generator)
    x *= torch.exp(spread * torch.randn(rows, in_features, generator=generator)).clamp(max=1e4)
    x = x.half().float()
    is_outlier = x.abs() >= torch.tensor(threshold).half()
    regular = torch.zeros(rows, in_features, dtype=torch.float64)
    for row in range(rows):
        row_codes, row_scale, _ = bitsandbytes.int8_vectorwise_quant(
            x[row : row + 1].half(), threshold=threshold
        )
        if row_scale > 0:
            regular[row] = row_codes.double() * row_scale.double() / 127
    weight = codes.double() * scales.double()[:, None] / 127
    outliers = x.double() * is_outlier
    error = reference.linear(x, codes, scales, None, threshold).double() - (regular + outliers) @ weight.t()
    most = outliers.abs().amax(1, keepdim=True) * weight.abs().sum(1) * SIXTEEN_BITS / 2
    rounded = 1e-6 * (regular.abs() + outliers.abs()) @ weight.abs().t()
    assert (error.abs() <= 1.01 * most + rounded).all()
    looking, blind = (reference.products(x, codes, threshold, looks) for looks in (True, False))
    assert torch.equal(looking, blind)


def test_many_rows_are_computed_in_pieces_alike() -> None:
    codes, scales = weight_of(16, 24)
    x = torch.randn(reference.ROWS_AT_ONCE + 3, 24, generator=torch.Generator().manual_seed(1)) * 4
    together = reference.linear(x, codes, scales, None, 6.0)
    assert torch.equal(together[-5:], reference.linear(x[-5:], codes, scales, None, 6.0))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_broken_row_shows_and_spares_the_others(broken: float, threshold: float) -> None:
    """No finite number may come of it: the guard behind the sampler must see the row."""
    codes, scales = weight_of(16, 24)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    want = reference.linear(x, codes, scales, None, threshold)
    x[1, 5] = broken
    y = reference.linear(x, codes, scales, None, threshold)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[::2], want[::2])


def test_a_row_of_zeros_is_its_bias() -> None:
    codes, scales = weight_of(16, 24)
    for threshold in (0.0, 6.0):
        y = reference.linear(torch.zeros(2, 24), codes, scales, torch.arange(16.0), threshold)
        assert torch.equal(y, torch.arange(16.0).expand(2, 16))


def test_nothing_asks_the_device() -> None:
    """On tensors without values a question about them is an error; so a graph can capture what passes."""
    with FakeTensorMode():
        x, codes = torch.randn(4, 24), torch.zeros(16, 24, dtype=torch.int8)
        assert reference.products(x, codes, 6.0, looks=False).shape == (4, 16)
        with pytest.raises(DynamicOutputShapeException):
            reference.products(x, codes, 6.0, looks=True)
