"""LLM.int8() in Triton's interpreter: the definition in torch and bitsandbytes' own codes, bit for bit."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm.reference import add_rms_norm
from service.kernels.gated_silu.reference import gated_silu
from service.kernels.int8_linear import reference
from service.kernels.int8_linear.plan import FEW_ROWS, Tile, block_for, splits_of, tile_for
from service.kernels.int8_rows import Live, OutlierRule
from service.precision.bitsandbytes_import import bitsandbytes
from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import relative_rms

THRESHOLD = 6.0
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.int8_linear.triton") as module:
        yield module


def rule(by_row: bool = True, threshold: float = THRESHOLD) -> OutlierRule:
    return OutlierRule(threshold, by_row, torch.zeros(2, dtype=torch.int64))


def rows_with_outliers(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows + width)) * 2
    x[::2, 5] *= 40
    x[-1, 17:21] = torch.tensor([900, 6.0, -41.7, 12.1])
    return x.to(dtype)


def weight_of(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out_features + in_features)
    codes = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    scales, bias = torch.rand(2, out_features, generator=generator) * 0.1
    return codes, scales, bias.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features"), [(1, 70, 200), (3, 130, 530), (17, 70, 2100), (70, 70, 200)]
)
def test_products_are_the_definition_s(
    kernels: ModuleType, num_rows: int, out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    """Few rows and many, shapes that no tile fits, with and without outliers and biases."""
    codes, scales, bias = weight_of(out_features, in_features, dtype)
    x = rows_with_outliers(num_rows, in_features, dtype)
    for threshold, added in ((THRESHOLD, bias), (0.0, None)):
        got = kernels.int8_linear(x, codes, scales, added, rule(threshold=threshold))
        assert torch.equal(got, reference.linear(x, codes, scales, added, threshold))
    assert not kernels.arrivals(x.device).any(), "the next launch counts from zero"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 200), (5, 2100)])
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_codes_are_bitsandbytes_own(
    kernels: ModuleType, num_rows: int, width: int, dtype: torch.dtype, threshold: float
) -> None:
    """By batch it takes whole columns out; by row each row is what it makes of that row alone."""
    x = rows_with_outliers(num_rows, width, dtype)
    x[0, :3] = torch.tensor([5.95, -5.95, 2.9749999])  # the largest regular one and its half: 127 and 63.5
    want, most, columns = bitsandbytes.int8_vectorwise_quant(x.half(), threshold=threshold)
    if threshold:
        want[:, columns] = 0
    for lists_columns in (False, True):
        rows = kernels.quantize_rows(x, rule(False, threshold), lists_columns=lists_columns)
        assert torch.equal(rows.codes[0], want)
        torch.testing.assert_close(rows.scales[0] * 127, most, rtol=2e-7, atol=0)
        if rows.columns is not None:
            found = rows.columns[: int(rows.num_columns)]
            assert torch.equal(found.sort().values.long(), columns)
    by_row = kernels.quantize_rows(x, rule(True, threshold))
    for row in range(min(num_rows, 5)):
        alone, _, _ = bitsandbytes.int8_vectorwise_quant(x[row : row + 1].half(), threshold=threshold)
        assert torch.equal(by_row.codes[0, row], alone[0])


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("num_rows", [4, 70])
def test_outliers_and_their_rule(kernels: ModuleType, num_rows: int, by_row: bool) -> None:
    """Against float64 of codes and of what the rule keeps, whose 16 bits err by 2^-16 of the largest."""
    codes, scales, _ = weight_of(70, 200, torch.float16)
    x = rows_with_outliers(num_rows, 200, torch.float16)
    x[1, 5] = 0.4  # no outlier itself, in a column that is one by batch
    is_outlier = x.abs() >= THRESHOLD
    kept = is_outlier if by_row else is_outlier.any(0).expand_as(x)
    most = x.float().masked_fill(is_outlier, 0).abs().amax(1, keepdim=True)
    regular = (x.float().masked_fill(kept, 0) * (127 / most)).round().double() * (most / 127)
    outliers = x.double() * kept
    weight = codes.double() * scales.double()[:, None] / 127
    told = rule(by_row)
    got = kernels.int8_linear(x, codes, scales, None, told).double()
    want = (regular + outliers) @ weight.t()
    bound = outliers.abs().amax(1, keepdim=True) * weight.abs().sum(1) * 2.0**-16 + want.abs() * 2.0**-10
    assert ((got - want).abs() <= bound + 1e-4).all()
    assert told.counts.tolist() == [int(kept.sum()), x.numel()]


def test_few_rows_and_many_agree_bit_for_bit(kernels: ModuleType) -> None:
    """A row's result depends neither on the rows beside it nor on tiles and splits."""
    codes, scales, bias = weight_of(70, 300, torch.float16)
    x = rows_with_outliers(FEW_ROWS + 2, 300, torch.float16)
    together = kernels.int8_linear(x, codes, scales, bias, rule())
    for first, last in ((0, 1), (3, 9), (0, FEW_ROWS), (FEW_ROWS + 1, FEW_ROWS + 2)):
        some = x[first:last].contiguous()
        assert torch.equal(kernels.int8_linear(some, codes, scales, bias, rule()), together[first:last])
    few = kernels.quantize_rows(x[:3].contiguous(), rule())
    for splits in (1, 2, 4):
        y = kernels.few_rows(few, codes, scales, bias, Tile(64, 64, 4, 2), splits)
        assert torch.equal(y, together[:3])


@pytest.mark.parametrize("num_rows", [6, 70])
def test_padding_flags_nothing(kernels: ModuleType, num_rows: int) -> None:
    """By batch an outlier in a row of padding would take its column out of all rows."""
    codes, scales, _ = weight_of(70, 200, torch.float16)
    x = rows_with_outliers(num_rows, 200, torch.float16)
    slots = torch.arange(num_rows) + 16
    slots[-2:] = torch.tensor([0, 15])
    x[-2:, 100] = 500
    for by_row in (True, False):
        told, alone = rule(by_row), rule(by_row)
        got = kernels.int8_linear(x, codes, scales, None, told, Live(slots, 16))
        want = kernels.int8_linear(x[:-2].contiguous(), codes, scales, None, alone)
        assert torch.equal(got[:-2], want)
        assert told.counts.tolist() == alone.counts.tolist()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("num_rows", "threshold"), [(3, THRESHOLD), (3, 0.0), (66, THRESHOLD)])
def test_a_broken_row_shows_and_spares_the_others(
    kernels: ModuleType, broken: float, num_rows: int, threshold: float
) -> None:
    codes, scales, _ = weight_of(70, 200, torch.float16)
    x = rows_with_outliers(num_rows, 200, torch.float16)
    want = kernels.int8_linear(x, codes, scales, None, rule(threshold=threshold))
    x[1, 9] = broken
    with np.errstate(invalid="ignore"):
        y = kernels.int8_linear(x, codes, scales, None, rule(threshold=threshold))
    assert not torch.isfinite(y[1]).any()
    spared = torch.arange(num_rows) != 1
    assert torch.equal(y[spared], want[spared])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [3, 66])
def test_a_gate_coded_as_it_is_made(kernels: ModuleType, num_rows: int, dtype: torch.dtype) -> None:
    """As from the gate alone, of which here and there a last bit is torch's own."""
    codes, scales, bias = weight_of(70, 200, dtype)
    gate_up = rows_with_outliers(num_rows, 400, dtype)
    x = gated_silu(gate_up)
    slots = torch.arange(num_rows) + 16
    slots[0] = 3
    told, alone = rule(), rule()
    y = kernels.gated_linear(gate_up, codes, scales, bias, told, Live(slots, 16))
    want = kernels.int8_linear(x, codes, scales, bias, alone, Live(slots, 16))
    assert relative_rms(y[1:], want[1:].float()) < 1e-3
    assert told.counts.tolist() == alone.counts.tolist()


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "width", "dtype"), [(3, 2100, torch.float16), (66, 200, torch.bfloat16)]
)
def test_a_norm_coded_as_it_is_made(
    kernels: ModuleType, num_rows: int, width: int, dtype: torch.dtype, adds: bool
) -> None:
    codes, scales, bias = weight_of(70, width, dtype)
    hidden, delta = rows_with_outliers(2 * num_rows, width, dtype).split(num_rows)
    gain = torch.rand(width, generator=torch.Generator().manual_seed(1)).to(dtype) + 0.5
    gain[7] = 9
    given = delta if adds else None
    want_total, x = add_rms_norm(hidden, given, gain, 1e-5)
    told, alone = rule(), rule()
    total, y = kernels.normed_linear(hidden, given, gain, 1e-5, codes, scales, bias, told, Live())
    assert torch.equal(total, want_total)
    want = kernels.int8_linear(x, codes, scales, bias, alone)
    assert relative_rms(y, want.float()) < 2e-3
    assert abs(int(told.counts[0] - alone.counts[0])) <= 1
    assert alone.counts[0] > num_rows / 2
    few = slice(0, 2)
    some = kernels.normed_linear(
        hidden[few], None if given is None else given[few], gain, 1e-5, codes, scales, bias, rule(), Live()
    )
    assert torch.equal(some[1], y[few]), "in any company"


def test_beyond_float16(kernels: ModuleType) -> None:
    """A bfloat16 of 100,000 is infinite to bitsandbytes; it is an outlier, and those keep their values."""
    codes, scales, _ = weight_of(70, 200, torch.bfloat16)
    x = rows_with_outliers(2, 200, torch.bfloat16)
    x[1, 9] = 1e5
    assert torch.isfinite(kernels.int8_linear(x, codes, scales, None, rule())).all()


def test_the_measured_shapes_take_the_measured_tiles() -> None:
    qkv, o, gate_up, down = (4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)
    shapes = (qkv, o, gate_up, down)
    assert [splits_of(*shape, tile_for(1, *shape)) for shape in shapes] == [2, 2, 1, 4]
    assert [splits_of(*shape, tile_for(16, *shape)) for shape in shapes] == [2, 2, 1, 2]
    assert [splits_of(*shape, tile_for(64, *shape)) for shape in shapes] == [2, 2, 1, 4]
    assert [tile_for(1, *shape).outputs for shape in shapes] == [64, 64, 128, 128]
    assert [block_for(1024, *shape).rows for shape in shapes] == [128] * 4
    assert splits_of(64, 4096, tile_for(1, 64, 4096)) == 1, "no split without inputs"


def test_a_row_that_no_program_holds_is_read_in_parts(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = rule()
    x = rows_with_outliers(3, 1400, torch.float16)
    gate_up = rows_with_outliers(3, 2800, torch.float16)
    gain = torch.rand(1400).half() + 0.5

    def coded() -> list[Tensor]:
        total, normed = kernels.quantize_normed(x, x.flip(1), gain, 1e-5, told, Live())
        rows = [kernels.quantize_rows(x, told, Live()), kernels.quantize_gated(gate_up, told, Live()), normed]
        return [total, *(part for each in rows for part in (each.codes, each.scales))]

    whole = coded()
    monkeypatch.setitem(kernels.quantize_rows.__globals__, "MOST_NUMBERS", 512)
    for part, wanted in zip(coded(), whole, strict=True):
        assert torch.equal(part, wanted)
