"""The linear whose rows do not depend on their number: in Triton's interpreter, bit for bit."""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import relative_rms

RELATIVE_RMS = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}
SHAPES = [(64, 512), (130, 100)]  # whole tiles and ragged ones
ROWS = ((0, 1), (77, 1), (40, 5), (3, 16), (0, 17), (66, 64))  # first of 130, how many


@pytest.fixture(scope="module")
def fixed() -> Iterator[ModuleType]:
    pytest.importorskip("triton")
    import_module("service.kernels.dense_linear.triton")  # whose own kernels are not interpreted
    with interpreted("service.kernels.fixed_linear.triton") as module:
        yield module


def tensors(
    rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(rows)
    shapes = (rows, in_features), (out_features, in_features), (out_features,)
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_agrees_with_torch(
    fixed: ModuleType, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x, weight, bias = tensors(33, out_features, in_features, dtype)
    for added in (bias, None):
        got = fixed.fixed_linear(x, weight, added)
        want = F.linear(x.float(), weight.float(), None if added is None else added.float())
        assert got.dtype == dtype
        assert relative_rms(got, want) < RELATIVE_RMS[dtype]
    assert not fixed.arrivals(x.device).any(), "the next launch counts from zero"


@pytest.mark.parametrize("dtype", RELATIVE_RMS, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_a_row_is_the_same_in_any_company(
    fixed: ModuleType, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    x, weight, bias = tensors(130, out_features, in_features, dtype)
    together = fixed.fixed_linear(x, weight, bias)
    for first, rows in ROWS:
        part = slice(first, first + rows)
        assert torch.equal(fixed.fixed_linear(x[part], weight, bias), together[part])


def test_shares_apart_are_shares_in_one_program(fixed: ModuleType) -> None:
    """Both kinds of tiles, with four shares of the inputs and eight: few rows and many give the same bits."""
    for in_features, splits in ((256, 4), (512, 8)):
        x, weight, bias = tensors(70, 300, in_features, torch.float16)
        assert fixed.splits_of(in_features, 300, fixed.FEW.inputs) == splits
        few = fixed.fixed_linear(x, weight, bias, tiles=fixed.FEW)
        many = fixed.fixed_linear(x, weight, bias, tiles=fixed.MANY)
        assert torch.equal(few, many)


def test_shares_depend_on_the_weight_alone(fixed: ModuleType) -> None:
    assert fixed.FEW.inputs == fixed.MANY.inputs
    assert fixed.FEW.rows == fixed.MANY.rows
    shapes = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (4096, 128256), (576, 960))
    assert [fixed.splits_of(*shape, 64) for shape in shapes] == [2, 2, 1, 2, 1, 1]
    chosen = {fixed.tiles_of(rows, 4096, torch.float16) for rows in (1, 64, 512, 1024)}
    assert chosen == {fixed.FEW, fixed.MANY}
