"""Many rows of LLM.int8() on an H100 by our own kernel: right, each time alike, captured, in any company.

The measure is float64 of codes that bitsandbytes makes of each row alone, and of outliers as they are.
`pytest -m gpu tests/gpu/test_w8_on_gpu.py`, by hand.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from torch import Tensor

from service.engine.self_check import check, check_made
from service.kernels import w8_linear
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.gated_silu import gated_silu
from service.kernels.int8_linear import gated_linear, int8_linear, normed_linear
from service.kernels.int8_rows import ALL_LIVE, Live, OutlierRule
from service.kernels.w8_linear import AFTER_ROWS, Shape, Tiles, absence, bind_int8, plan
from service.kernels.w8_linear.cuda import workspace_on
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.bitsandbytes_import import bitsandbytes
from service.precision.int8 import Int8Linear
from service.precision.linear import LinearSpec

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
THRESHOLD = 6.0
DTYPES = (torch.float16, torch.bfloat16)
ROUNDED = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of results alone 2.1e-4 and 1.7e-3
# (out, in): Llama-3.1-8B's four, the demo model's, ragged edges
REAL = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
SHAPES = [*REAL, (960, 576), (576, 1536), (144, 1056), (16, 32), (4112, 8224)]
ROWS = (17, 24, 32, 33, 64, 65, 100, 128, 200, 256, 257, 700, 1024)
COUNTS = (0, 3, 32, 256, 700)  # outlier columns, each in every second row
PADDED = 2


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Every variant of the shapes above, compiled and loaded."""
    if reason := absence():
        pytest.skip(reason)
    shapes = [Shape("int8", *shape, dtype, threshold=THRESHOLD) for shape, dtype in product(SHAPES, DTYPES)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(w8_linear.load, {row.variant for shape in shapes for row in plan(shape)}))


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialized is full of NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rule(by_row: bool = True, threshold: float = THRESHOLD) -> OutlierRule:
    return OutlierRule(threshold, by_row, torch.zeros(2, dtype=torch.int64, device=CUDA))


def weight_of(
    out_features: int, in_features: int, dtype: torch.dtype, told: OutlierRule, number: int = 0
) -> tuple[Tensor, Tensor, Tiles]:
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=CUDA)
    scales = torch.rand(out_features, device=CUDA) * 0.1 + 1e-3
    shape = Shape("int8", out_features, in_features, dtype, threshold=told.threshold)
    return codes, scales, bind_int8(codes, scales / 127, None, told, shape, number)


def rows_with_outliers(num_rows: int, width: int, dtype: torch.dtype, count: int) -> Tensor:
    x = torch.randn(num_rows, width, device=CUDA).clamp_(-5.5, 5.5)
    columns = torch.randperm(width, device=CUDA)[: min(count, width)]
    has = (torch.arange(num_rows, device=CUDA)[:, None] + columns) % 2 == 0
    lifted = torch.empty(has.shape, device=CUDA).uniform_(6, 60).copysign(x[:, columns])
    x[:, columns] = torch.where(has, lifted, x[:, columns])
    return x.to(dtype)


def defined(x: Tensor, codes: Tensor, scales: Tensor, by_row: bool = True) -> Tensor:
    """float64 [T, out]."""
    is_outlier = x.half().abs() >= THRESHOLD
    kept = is_outlier if by_row else is_outlier.any(0).expand_as(x)
    row_codes, most, _ = bitsandbytes.int8_vectorwise_quant(x.half().masked_fill(is_outlier, 0))
    regular = row_codes.masked_fill(kept, 0).double() * (most[:, None].double() / 127)
    return (regular + x.double() * kept) @ (codes.double() * scales.double()[:, None] / 127).t()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def assert_idle() -> None:
    workspace = workspace_on(CUDA, "int8")
    assert not workspace.arrived.any()
    assert not workspace.gathered.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_it_computes_what_the_rule_says(out_features: int, in_features: int, dtype: torch.dtype) -> None:
    torch.manual_seed(out_features + in_features)
    told = rule()
    codes, scales, tiles = weight_of(out_features, in_features, dtype, told)
    for num_rows, count in product(ROWS, COUNTS):
        x = rows_with_outliers(num_rows, in_features, dtype, count)
        told.counts.zero_()
        with poisoned():
            got = int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        assert got.dtype == dtype
        assert told.counts.tolist() == [int((x.half().abs() >= THRESHOLD).sum()), x.numel()]
        error = relative(got[-200:], defined(x[-200:], codes, scales))
        assert error <= ROUNDED[dtype], (num_rows, count, error)
        # its own bits, which nobody has cleared, are marked once more
        again = int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        assert relative(again, got.double()) <= ROUNDED[dtype]
        third = int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        assert torch.equal(again, third), "run to run"
        tiles.marks.bitmap.zero_()
    assert_idle()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threshold", [0.0, THRESHOLD])
def test_by_batch_and_without_outliers(dtype: torch.dtype, threshold: float) -> None:
    told = rule(False, threshold)
    codes, scales, tiles = weight_of(4096, 4096, dtype, told)
    for num_rows, count in product((17, 64, 200, 1024), (0, 32, 256)):
        x = rows_with_outliers(num_rows, 4096, dtype, count)
        got = int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        if threshold:
            want = defined(x, codes, scales, by_row=False)
        else:
            want = int8_linear(x, codes, scales, None, rule(False, 0.0)).double()
        assert relative(got, want) <= ROUNDED[dtype], (num_rows, count)
    assert_idle()


@pytest.mark.parametrize(("out_features", "in_features"), REAL)
def test_neighbours_do_not_move_a_row(out_features: int, in_features: int) -> None:
    """But for the order in which sums are added up; their outliers are nothing to it."""
    told = rule()
    codes, scales, tiles = weight_of(out_features, in_features, torch.float16, told)
    for count in (0, 40):
        x = rows_with_outliers(1025, in_features, torch.float16, count)
        together = int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        for first, size in ((7, 17), (100, 40), (200, 64), (300, 130), (500, 257)):
            tiles.marks.bitmap.zero_()
            some = int8_linear(x[first : first + size].clone(), codes, scales, None, told, ALL_LIVE, tiles)
            want = together[first : first + size]
            assert relative(some, want.double()) <= (5e-4 if count else 1e-4), (count, first, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [17, 64, 257])
def test_rows_coded_as_they_are_made(num_rows: int, dtype: torch.dtype) -> None:
    told = rule()
    gate_up = torch.randn(num_rows, 2 * 14336, device=CUDA).to(dtype) * 4
    codes, scales, tiles = weight_of(4096, 14336, dtype, told)
    y = gated_linear(gate_up, codes, scales, None, told, ALL_LIVE, tiles)
    assert relative(y, defined(gated_silu(gate_up), codes, scales)) <= ROUNDED[dtype]
    hidden, delta = torch.randn(2, num_rows, 4096, device=CUDA).to(dtype)
    gain = torch.rand(4096, device=CUDA).to(dtype) + 0.5
    gain[::500] = 9
    codes, scales, tiles = weight_of(6144, 4096, dtype, told, 1)
    for given in (delta, None):
        want_total, x = add_rms_norm(hidden, given, gain, 1e-5)
        total, y = normed_linear(hidden, given, gain, 1e-5, codes, scales, None, told, ALL_LIVE, tiles)
        assert torch.equal(total, want_total)
        assert relative(y, defined(x, codes, scales)) <= 4e-3  # a sum of squares in another order


@pytest.mark.parametrize("num_rows", [24, 64, 200])
@pytest.mark.parametrize("by_row", [True, False])
def test_captured_with_padding(by_row: bool, num_rows: int) -> None:
    """Two layers, replayed on other numbers whose last rows are nobody's: those mark nothing."""
    told = rule(by_row)
    first = weight_of(4096, 4096, torch.float16, told, 0)
    second = weight_of(4096, 4096, torch.float16, told, 1)
    x = rows_with_outliers(num_rows, 4096, torch.float16, 3)
    slots = torch.arange(num_rows, device=CUDA) + 16
    live = Live(slots, 16)

    def both(x: Tensor, live: Live) -> tuple[Tensor, Tensor]:
        (codes, scales, tiles), (more, of_more, other) = first, second
        y = int8_linear(x, codes, scales, None, told, live, tiles)
        return y, int8_linear(x.flip(1), more, of_more, None, told, live, other)

    both(x, live)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(x, live)
    slots[-PADDED:] = 0
    for count in (32, 0, 256):
        given = rows_with_outliers(num_rows, 4096, torch.float16, count)
        given[-PADDED:, :100] = 300
        x.copy_(given)
        told.counts.zero_()
        for y in captured:
            y.fill_(float("nan"))
        graph.replay()
        rows = given[:-PADDED]
        for y, row, (codes, scales, _) in zip(captured, (rows, rows.flip(1)), (first, second), strict=True):
            want = defined(row, codes, scales, by_row)
            assert relative(y[:-PADDED], want) <= ROUNDED[torch.float16], count
        assert int(told.counts[1]) == 2 * rows.numel()
    bitmaps = workspace_on(CUDA, "int8").bitmaps
    assert by_row == (not bitmaps[2].any()), "by row the second layer has cleared the first one's"
    assert_idle()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_asks_the_device() -> None:
    told = rule()
    codes, scales, tiles = weight_of(4096, 4096, torch.float16, told)
    for num_rows in (17, 64, 300):
        x = rows_with_outliers(num_rows, 4096, torch.float16, 32)
        int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        torch.cuda.set_sync_debug_mode("error")
        try:
            int8_linear(x, codes, scales, None, told, ALL_LIVE, tiles)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_layer_of_the_backend(dtype: torch.dtype, deterministic: bool) -> None:
    """Its own check passes with every variant; a deterministic one keeps the kernels that add integers."""
    spec = LinearSpec("down", 1536, 576, bias=True)
    group = LinearGroup("down_proj", (spec,), CUDA, dtype, deterministic)
    weights = {"down.weight": torch.randn(576, 1536) / 40, "down.bias": torch.randn(576)}
    layer = load_backend("int8").build(group, weights.__getitem__)
    assert isinstance(layer, Int8Linear)
    assert ("w8_tile" in layer.kernel) != deterministic
    assert layer.row_invariant == deterministic
    assert {AFTER_ROWS, 256} <= set(layer.kernel_rows)
    with torch.inference_mode():
        check(layer, 0.04)
        check_made(layer, 0.04)
