"""E4M3 linears in Triton's interpreter: codes of the definition bit for bit, sums to bfloat16's rounding."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm.reference import add_rms_norm
from service.kernels.fp8_linear import reference
from service.kernels.fp8_linear.plan import setting_for, splits_for
from service.kernels.gated_silu.reference import gated_silu
from service.kernels.int8_linear.plan import Tile
from service.kernels.w8_linear import FewRows, Row
from service.kernels.w8_linear import reference as w8_reference
from service.kernels.w8_linear.variants import Tile as TileVariant
from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import relative_rms


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.fp8_linear.triton") as module:
        yield module


def rows_of(num_rows: int, width: int) -> Tensor:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows + width)) * 3
    x[:, 5] *= 40
    return x.bfloat16()


def weight_of(out_features: int, in_features: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(out_features + in_features)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator).bfloat16()
    return *reference.quantize_rows(weight), bias


@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (3, 2100), (66, 40)])
def test_codes_are_the_definition_s(kernels: ModuleType, num_rows: int, width: int) -> None:
    x = rows_of(num_rows, width)
    x[0, :3] = torch.tensor([448.0, 17.0, -19.0])  # ties of E4M3 where the scale is 1
    x[0, 3:] /= 100
    x[-1] = 0 if num_rows > 1 else x[-1]
    codes, scales = kernels.quantize_rows(x)
    want, want_scales = reference.quantize_rows(x)
    assert torch.equal(codes.view(torch.uint8), want.view(torch.uint8))
    assert torch.equal(scales, want_scales)


@pytest.mark.parametrize(
    ("num_rows", "out_features", "in_features", "splits"),
    [(1, 70, 208, 0), (5, 130, 2096, 0), (17, 64, 512, 2), (64, 64, 1040, 4)],
)
def test_few_rows(
    kernels: ModuleType, num_rows: int, out_features: int, in_features: int, splits: int
) -> None:
    codes, scales, bias = weight_of(out_features, in_features)
    x = rows_of(num_rows, in_features)
    rows, row_scales = reference.quantize_rows(x)
    for added in (bias, None):
        tile = Tile(64, 128, 4, 2) if splits else None
        got = kernels.few_rows(x, rows, row_scales, codes, scales, added, tile, splits)
        assert got.dtype == torch.bfloat16
        assert relative_rms(got, reference.fp8_linear(x, codes, scales, added)) < 6e-3
    assert not kernels.arrivals(x.device).any(), "the next launch counts from zero"


@pytest.mark.parametrize("held", [16384, 512])
def test_what_precedes_a_linear_is_made_with_its_codes(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """Codes of what kernels/gated_silu and add_rms_norm give, also of rows that no program holds whole."""
    monkeypatch.setitem(kernels.held.__globals__, "MOST_NUMBERS", held)
    gate_up, hidden, delta = rows_of(3, 2400), rows_of(3, 1200), rows_of(3, 1200).flip(1)
    gain = torch.rand(1200).bfloat16() + 0.5
    codes, scales = kernels.quantize_gated(gate_up)
    want, want_scales = reference.quantize_rows(gated_silu(gate_up))
    assert relative_rms(codes.float() * scales[:, None], want.float() * want_scales[:, None]) < 4e-3
    for given in (delta, None):
        total, (codes, scales) = kernels.quantize_normed(hidden, given, gain, 1e-5)
        want_total, normed = add_rms_norm(hidden, given, gain, 1e-5)
        want, want_scales = reference.quantize_rows(normed)
        assert torch.equal(total, want_total)
        assert relative_rms(codes.float() * scales[:, None], want.float() * want_scales[:, None]) < 4e-3
    weight, of_weight, bias = weight_of(64, 1200)
    y = kernels.gated_linear(gate_up, weight, of_weight, bias)
    assert relative_rms(y, reference.fp8_linear(gated_silu(gate_up), weight, of_weight, bias)) < 6e-3
    _, y = kernels.normed_linear(hidden, None, gain, 1e-5, weight, of_weight, bias)
    assert relative_rms(y, reference.fp8_linear(normed, weight, of_weight, bias)) < 6e-3


def test_few_rows_go_where_they_are_bound_to(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the codes of whatever precedes the linear; more rows are torch's affair as ever."""
    codes, scales, _ = weight_of(64, 208)
    asked: list[int] = []

    def multiply(rows: Tensor, row_scales: Tensor) -> Tensor:
        asked.append(len(rows))
        return w8_reference.fp8_linear(codes, scales, torch.bfloat16, rows, row_scales)

    few = FewRows((Row(1, 3, TileVariant("fp8", 1, 16, 1, 3)),), multiply)
    x, gate_up, gain = rows_of(3, 208), rows_of(3, 416), torch.rand(208).bfloat16()
    given = codes, scales, None
    _, y = kernels.normed_linear(x, None, gain, 1e-5, *given, few)
    found = [kernels.fp8_linear(x, *given, few), kernels.gated_linear(gate_up, *given, few), y]
    assert asked == [3, 3, 3]
    _, y = kernels.normed_linear(x, None, gain, 1e-5, *given)
    want = [kernels.fp8_linear(x, *given), kernels.gated_linear(gate_up, *given), y]
    for got, as_triton in zip(found, want, strict=True):
        assert relative_rms(got, as_triton.double()) < 2e-3
    by_torch = torch.zeros(4, 64)
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **named: by_torch)
    assert kernels.fp8_linear(rows_of(65, 208), *given, few) is by_torch
    for num_rows in (1, 4):
        assert kernels.fp8_linear(rows_of(num_rows, 208), *given, few).shape == (num_rows, 64)
    assert len(asked) == 3, "what its plan leaves out is Triton's"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_shows_and_spares_the_others(kernels: ModuleType, broken: float) -> None:
    codes, scales, _ = weight_of(64, 208)
    x = rows_of(3, 208)
    want = kernels.fp8_linear(x, codes, scales, None)
    x[1, 9] = broken
    with np.errstate(invalid="ignore"):
        y = kernels.fp8_linear(x, codes, scales, None)
    assert not torch.isfinite(y[1]).any()
    assert torch.equal(y[::2], want[::2])


def test_the_measured_shapes_take_the_measured_tiles() -> None:
    shapes = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
    splits = {1: [4, 4, 1, 8], 16: [2, 2, 1, 2], 32: [2, 2, 1, 2], 64: [2, 2, 1, 4]}
    for num_rows, want in splits.items():
        found = [splits_for(*shape, setting_for(num_rows, *shape)) for shape in shapes]
        assert found == want
