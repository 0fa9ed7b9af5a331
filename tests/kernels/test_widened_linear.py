"""16-bit products of a CPU that has none: float32's, rounded once, whatever is widened at a time."""

import pytest
import torch
import torch.nn.functional as F

from service.kernels.dense_linear import dense_linear, linear_kernel, pack_weight, widened


@pytest.fixture(autouse=True)
def no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "has_products", lambda dtype: dtype is torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [3, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_sums_are_float32_and_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_rows: int, biased: bool
) -> None:
    monkeypatch.setattr(widened, "WIDENED_WEIGHTS", 5 * 48)  # five outputs at a time, and three at last
    x, weight = torch.randn(num_rows, 48).to(dtype), torch.randn(48, 23).to(dtype).t()
    bias = torch.randn(23).to(dtype) if biased else None
    want = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    got = widened.linear(x, weight, bias)
    assert got.dtype is dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_few_rows_are_torchs(num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 48).bfloat16(), torch.randn(23, 48).bfloat16()
    assert torch.equal(widened.linear(x, weight), F.linear(x, weight))


def test_it_serves_weights_that_are_not_packed() -> None:
    x, weight = torch.randn(9, 48).half(), torch.randn(23, 48).half()
    packed = pack_weight(weight)
    assert linear_kernel(packed) == "torch.linear"
    torch.testing.assert_close(dense_linear(x, packed), widened.linear(x, weight))


def test_sums_of_codes_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 2^24, where float32 has gaps; in parts of the outputs too."""
    monkeypatch.setattr(widened, "WIDENED_WEIGHTS", 4 * widened.EXACT_INPUTS)
    x, weight = torch.full((5, 2500), 127, dtype=torch.int8), torch.full((11, 2500), 127, dtype=torch.int8)
    weight[3], weight[7, ::3] = -127, 126
    want = x.int().double() @ weight.double().t()
    assert want.max() > 1 << 24
    assert torch.equal(widened.code_product(x, weight), want.int())
