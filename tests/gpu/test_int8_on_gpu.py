"""LLM.int8() on an H100: codes, sums and rules as defined, captured, in any company, twice the same."""

import itertools

import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.gated_silu import gated_silu
from service.kernels.int8_linear import gated_linear, int8_linear, normed_linear, reference
from service.kernels.int8_linear.plan import FEW_ROWS
from service.kernels.int8_rows import ALL_LIVE, Live, OutlierRule
from service.precision.bitsandbytes_import import bitsandbytes

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
THRESHOLD = 6.0
DTYPES = (torch.float16, torch.bfloat16)
ROUNDED = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}  # what rounding leaves of many numbers, or less
# (out, in): Llama-3.1-8B's four, the demo model's two narrowest, ragged edges
REAL = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
SHAPES = [*REAL, (960, 576), (576, 1536), (72, 192), (130, 4100), (1001, 777), (8, 8)]
ROWS = (1, 3, 4, 5, 16, 17, 33, 64, 65, 200, 257, 1024, 1025)
COUNTS = (0, 3, 32, 256)  # outlier columns, each in every second row


def weight_of(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=CUDA)
    return codes, torch.rand(out_features, device=CUDA) * 0.1 + 1e-3


def rows_with_outliers(num_rows: int, width: int, dtype: torch.dtype, count: int) -> Tensor:
    x = torch.randn(num_rows, width, device=CUDA).clamp_(-5.5, 5.5)
    columns = torch.randperm(width, device=CUDA)[: min(count, width)]
    has = (torch.arange(num_rows, device=CUDA)[:, None] + columns) % 2 == 0
    lifted = torch.empty(has.shape, device=CUDA).uniform_(6, 60).copysign(x[:, columns])
    x[:, columns] = torch.where(has, lifted, x[:, columns])
    return x.to(dtype)


def rule(by_row: bool = True, threshold: float = THRESHOLD) -> OutlierRule:
    return OutlierRule(threshold, by_row, torch.zeros(2, dtype=torch.int64, device=CUDA))


def defined(x: Tensor, codes: Tensor, scales: Tensor, by_row: bool) -> Tensor:
    """float64 [T, out] of bitsandbytes' codes and of the outliers as they are."""
    is_outlier = x.half().abs() >= THRESHOLD
    kept = is_outlier if by_row else is_outlier.any(0).expand_as(x)
    row_codes, most, _ = bitsandbytes.int8_vectorwise_quant(x.half().masked_fill(is_outlier, 0))
    regular = row_codes.masked_fill(kept, 0).double() * (most[:, None].double() / 127)
    weight = codes.double() * scales.double()[:, None] / 127
    return (regular + x.double() * kept) @ weight.t()


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_errors_are_those_of_a_16_bit_product(
    out_features: int, in_features: int, dtype: torch.dtype
) -> None:
    """At most twice cuBLAS' own, for any rows and outliers, in memory that was NaN before."""
    torch.manual_seed(out_features + in_features)
    codes, scales = weight_of(out_features, in_features)
    weight = (codes.float() * (scales[:, None] / 127)).to(dtype)
    for num_rows, count in itertools.product(ROWS, COUNTS):
        x = rows_with_outliers(num_rows, in_features, dtype, count)
        told = rule()
        torch.full((num_rows, out_features), float("nan"), device=CUDA, dtype=dtype)
        got = int8_linear(x, codes, scales, None, told)
        assert got.dtype == dtype
        want = defined(x[:256], codes, scales, by_row=True)
        of_cublas = relative_rms(x[:256] @ weight.t(), x[:256].double() @ weight.double().t())
        of_cublas = max(of_cublas, ROUNDED[dtype])  # eight numbers may all lie near their roundings
        error = relative_rms(got[:256], want)
        assert error <= 2 * of_cublas, (num_rows, count, error, of_cublas)
        assert told.counts.tolist() == [int((x.half().abs() >= THRESHOLD).sum()), x.numel()]
        again = int8_linear(x, codes, scales, None, told)
        assert torch.equal(got, again), "run to run"


@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
@pytest.mark.parametrize("width", [576, 777, 4096, 14336])
def test_codes_are_bitsandbytes_own(width: int, threshold: float) -> None:
    """Those of its kernel on this device, by whose approximate quotient ties fall."""
    from service.kernels.int8_rows.triton import quantize_rows

    for num_rows, dtype in itertools.product((1, 16, 64, 257, 1024), DTYPES):
        x = rows_with_outliers(num_rows, width, dtype, 32)
        want, _, columns = bitsandbytes.int8_vectorwise_quant(x.half(), threshold=threshold)
        if threshold and columns is not None:
            want[:, columns] = 0
        for lists_columns in (False, True):
            rows = quantize_rows(x, rule(False, threshold), lists_columns=lists_columns)
            assert torch.equal(rows.codes[0], want), (num_rows, dtype, lists_columns)
            if rows.columns is not None and rows.num_columns is not None:
                found = rows.columns[: int(rows.num_columns)].sort().values.long()
                assert torch.equal(found, columns)


def without_ties(x: Tensor) -> Tensor:
    """0 for numbers halfway between two codes, which a reciprocal takes up or down: of a row of bfloat16 they
    can be five, and each moves all sums of the row by 5e-4 of their size."""
    regular = torch.where(x.abs() < THRESHOLD, x, 0).double()
    codes = regular * 127 / regular.abs().amax(1, keepdim=True)
    return x.masked_fill((codes.abs().frac() - 0.5).abs() < 1e-4, 0)


@pytest.mark.parametrize(("out_features", "in_features"), [*REAL, (1001, 777)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_the_definition_s(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    """Against torch on the same device, which divides exactly."""
    codes, scales = weight_of(out_features, in_features)
    bias = torch.randn(out_features, device=CUDA).to(dtype)
    for num_rows in (1, 16, 64, 257):
        x = without_ties(rows_with_outliers(num_rows, in_features, dtype, 32))
        want = reference.linear(x, codes, scales, bias, THRESHOLD)
        got = int8_linear(x, codes, scales, bias, rule())
        assert relative_rms(got, want.double()) < 1e-3


@pytest.mark.parametrize(("out_features", "in_features"), [*REAL, (130, 4100)])
def test_a_row_is_the_same_in_any_company(out_features: int, in_features: int) -> None:
    """Bit for bit, whichever kernel computes it."""
    codes, scales = weight_of(out_features, in_features)
    x = rows_with_outliers(1025, in_features, torch.float16, 40)
    together = int8_linear(x, codes, scales, None, rule())
    for first, count in ((0, 1), (7, 4), (100, 16), (200, 33), (0, FEW_ROWS), (500, 65), (768, 257)):
        some = int8_linear(x[first : first + count].clone(), codes, scales, None, rule())
        assert torch.equal(some, together[first : first + count]), (first, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 16, 64, 65, 257])
def test_rows_coded_as_they_are_made(num_rows: int, dtype: torch.dtype) -> None:
    """The gate's bit for bit as from its own kernel; the norm's but for the order of a sum of squares."""
    gate_up = torch.randn(num_rows, 2 * 14336, device=CUDA).to(dtype) * 4
    codes, scales = weight_of(4096, 14336)
    told, alone = rule(), rule()
    y = gated_linear(gate_up, codes, scales, None, told, ALL_LIVE)
    assert torch.equal(y, int8_linear(gated_silu(gate_up), codes, scales, None, alone))
    assert torch.equal(told.counts, alone.counts)
    assert alone.counts[0] > 0
    hidden, delta = torch.randn(2, num_rows, 4096, device=CUDA).to(dtype)
    gain = torch.rand(4096, device=CUDA).to(dtype) + 0.5
    gain[::500] = 9
    codes, scales = weight_of(6144, 4096)
    for given in (delta, None):
        want_total, x = add_rms_norm(hidden, given, gain, 1e-5)
        told, alone = rule(), rule()
        total, y = normed_linear(hidden, given, gain, 1e-5, codes, scales, None, told, ALL_LIVE)
        assert torch.equal(total, want_total)
        assert relative_rms(y, int8_linear(x, codes, scales, None, alone).double()) < 3e-3
        some = normed_linear(
            hidden[:1],
            None if given is None else given[:1],
            gain,
            1e-5,
            codes,
            scales,
            None,
            rule(),
            ALL_LIVE,
        )
        assert torch.equal(some[1], y[:1]), "in any company"


@pytest.mark.parametrize("num_rows", [5, 64, 200])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), [(6144, 4096), (576, 1536)])
def test_captured_with_padding(out_features: int, in_features: int, by_row: bool, num_rows: int) -> None:
    """A replay on other numbers, whose last rows are nobody's: they flag nothing and are not counted."""
    codes, scales = weight_of(out_features, in_features)
    x = rows_with_outliers(num_rows, in_features, torch.float16, 3)
    slots = torch.arange(num_rows, device=CUDA) + 16
    told, live = rule(by_row), Live(slots, 16)
    int8_linear(x, codes, scales, None, told, live)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = int8_linear(x, codes, scales, None, told, live)
    given = rows_with_outliers(num_rows, in_features, torch.float16, 32)
    given[-2:, :100] = 300
    x.copy_(given)
    slots[-2:] = 0
    told.counts.zero_()
    captured.fill_(float("nan"))
    graph.replay()
    alone = rule(by_row)
    want = int8_linear(given[:-2].clone(), codes, scales, None, alone, ALL_LIVE)
    assert torch.equal(captured[:-2], want)
    assert torch.equal(told.counts, alone.counts)
    if not by_row:
        assert relative_rms(want, defined(given[:-2], codes, scales, by_row=False)) < 1e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_asks_the_device() -> None:
    codes, scales = weight_of(4096, 4096)
    for num_rows, by_row in itertools.product((1, 64, 300), (True, False)):
        x = rows_with_outliers(num_rows, 4096, torch.float16, 32)
        told = rule(by_row)
        int8_linear(x, codes, scales, None, told)
        torch.cuda.set_sync_debug_mode("error")
        try:
            int8_linear(x, codes, scales, None, told)
        finally:
            torch.cuda.set_sync_debug_mode("default")
