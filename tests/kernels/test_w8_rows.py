"""What int8's rows leave for kernels/w8_linear, in Triton's interpreter: codes as ever, marks, products."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm.reference import add_rms_norm
from service.kernels.gated_silu.reference import gated_silu
from service.kernels.int8_linear import reference
from service.kernels.int8_rows import ALL_LIVE, Live, Marks, OutlierRule
from service.kernels.w8_linear import AFTER_ROWS, Shape, Tiles, bind_int8
from tests.kernels.interpreter import interpreted

THRESHOLD = 6.0
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.int8_linear.triton") as module:
        yield module


def rule(by_row: bool = True, threshold: float = THRESHOLD) -> OutlierRule:
    return OutlierRule(threshold, by_row, torch.zeros(2, dtype=torch.int64))


def rows_with_outliers(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows + width))
    x.clamp_(-5.9, 5.9)
    x[::2, 31] = 40
    x[-1, 64:68] = torch.tensor([900, 6.0, -41.7, 5.99])
    x[0, width - 1] = -7
    return x.to(dtype)


def marks() -> Marks:
    return Marks(torch.zeros(1024, dtype=torch.int32), torch.full((1024,), -1, dtype=torch.int32))


def columns_of(bitmap: Tensor) -> list[int]:
    bits = bitmap[:, None] >> torch.arange(32, dtype=torch.int32) & 1
    return bits.flatten().nonzero()[:, 0].tolist()


def tiles_for(told: OutlierRule, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tiles]:
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(-127, 128, (48, width), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(2, 48, generator=generator) * 0.1
    bias = bias.to(dtype)
    shape = Shape("int8", 48, width, dtype, True, told.threshold)
    return codes, scales, bias, bind_int8(codes, scales / 127, bias, told, shape, 0)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "width", "dtype"),
    [(20, 208, torch.float16), (20, 2112, torch.bfloat16), (66, 2112, torch.float16)],
)
def test_columns_are_marked_beside_the_same_codes(
    kernels: ModuleType, num_rows: int, width: int, dtype: torch.dtype, by_row: bool
) -> None:
    """By one program a row, and by one a tile of it."""
    x, told, listed = rows_with_outliers(num_rows, width, dtype), rule(by_row), rule(by_row)
    slots = torch.full((num_rows,), 20)
    slots[-1] = 3  # padding
    live, given = Live(slots, 16), marks()
    rows = kernels.quantize_rows(x, told, live, marks=given)
    assert columns_of(given.bitmap) == [31, width - 1]
    assert not given.spent.any() or not by_row, "the one before is cleared"
    want = kernels.quantize_rows(x, listed, live, lists_columns=True)
    assert torch.equal(rows.codes, want.codes)
    assert torch.equal(rows.scales, want.scales)
    assert torch.equal(told.counts, listed.counts)
    assert torch.equal(rows.x, x)


def test_marks_are_added_by_row_and_written_anew_by_batch(kernels: ModuleType) -> None:
    x = rows_with_outliers(20, 208, torch.float16)
    for by_row in (True, False):
        given = marks()
        given.bitmap[2] = -(1 << 31)
        kernels.quantize_rows(x, rule(by_row), marks=given)
        assert columns_of(given.bitmap) == [31, 64, 65, 66, *([95] if by_row else []), 207]


def test_without_outliers_nothing_is_marked(kernels: ModuleType) -> None:
    given = marks()
    x = rows_with_outliers(20, 208, torch.float16)
    rows = kernels.quantize_rows(x, rule(threshold=0.0), marks=given)
    assert not given.bitmap.any()
    assert (rows.codes.abs().amax(2) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("by_row", "threshold"), [(True, THRESHOLD), (False, THRESHOLD), (True, 0.0)])
def test_many_rows_come_to_the_same(
    kernels: ModuleType, by_row: bool, threshold: float, dtype: torch.dtype
) -> None:
    """As by the kernels that serve elsewhere, but for rounding; few rows are theirs."""
    told = rule(by_row, threshold)
    codes, scales, bias, tiles = tiles_for(told, 208, dtype)
    for num_rows in (AFTER_ROWS, AFTER_ROWS + 1):
        x = rows_with_outliers(num_rows, 208, dtype)
        got = kernels.int8_linear(x, codes, scales, bias, told, ALL_LIVE, tiles)
        want = kernels.int8_linear(x, codes, scales, bias, rule(by_row, threshold))
        assert got.dtype == dtype
        assert relative(got, want) < (4e-3 if dtype is torch.bfloat16 else 5e-4)
        assert torch.equal(got, want) or num_rows > AFTER_ROWS
        if by_row:
            assert relative(got, reference.linear(x, codes, scales, bias, threshold)) < 4e-3
    assert bool(tiles.marks.bitmap.any()) == (threshold > 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_and_gate_leave_what_they_have_made(kernels: ModuleType, dtype: torch.dtype) -> None:
    told = rule()
    codes, scales, bias, tiles = tiles_for(told, 208, dtype)
    gate_up = torch.randn(20, 416, generator=torch.Generator().manual_seed(1)).to(dtype) * 4
    given = codes, scales, bias, told, ALL_LIVE
    y = kernels.gated_linear(gate_up, *given, tiles)
    assert relative(y, kernels.int8_linear(gated_silu(gate_up), *given)) < 5e-3
    hidden, delta = torch.randn(2, 20, 208, generator=torch.Generator().manual_seed(2)).to(dtype)
    gain = torch.ones(208, dtype=dtype)
    gain[::50] = 9
    total, y = kernels.normed_linear(hidden, delta, gain, 1e-5, *given, tiles)
    want, made = add_rms_norm(hidden, delta, gain, 1e-5)
    assert torch.equal(total, want)
    assert relative(y, kernels.int8_linear(made, *given)) < 5e-3
    assert set(columns_of(tiles.marks.bitmap)) > {0, 50}
