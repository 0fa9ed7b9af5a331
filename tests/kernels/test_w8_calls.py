"""What a bound 8-bit weight tells the W8A8 kernel of its plan; no kernel runs."""

from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

from service.kernels.cuda import driver
from service.kernels.int8_rows import OutlierRule
from service.kernels.w8_linear import Shape
from service.kernels.w8_linear.plan import TABLES, Settings

pytest.importorskip("triton")

from service.kernels.int8_rows.triton import Rows
from service.kernels.w8_linear import cuda
from tests.kernels.told_driver import STREAM, Driver, Map, stand_in

OUTS, WIDTH = 4096, 8192  # deep: few rows share tiles
NUM_ARGUMENTS = 18
BYTES = driver.MAP_TYPES[torch.int8]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(cuda, "_workspaces", WeakValueDictionary())
    return stand_in(monkeypatch, cuda, NUM_ARGUMENTS)


def bound(number: int = 0, bias: Tensor | None = None, **changes: float) -> cuda.BoundInt8:
    codes, steps = torch.zeros(OUTS, WIDTH, dtype=torch.int8), torch.zeros(OUTS)
    rule = OutlierRule(changes.get("threshold", 6.0), bool(changes.get("by_row", True)), torch.zeros(2))
    shape = Shape("int8", OUTS, WIDTH, torch.float16, bias is not None, rule.threshold)
    return cuda.BoundInt8(cuda.Weight(codes, steps), bias, rule, shape, number)


def bound_fp8() -> cuda.BoundFP8:
    """Under a table that leaves 17 to 32 rows to another kernel."""
    codes = torch.zeros(OUTS, WIDTH, dtype=torch.float8_e4m3fn)
    few, more = Settings(16, 1, 10), Settings(64, 1, 8, cuts=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLES, "fp8", ((16, (None, few, None)), (32, (None,) * 3), (64, (more,) * 3)))
        return cuda.BoundFP8(cuda.Weight(codes, torch.zeros(OUTS)), Shape("fp8", OUTS, WIDTH, torch.bfloat16))


def fp8_rows_of(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(num_rows, WIDTH, dtype=torch.float8_e4m3fn), torch.zeros(num_rows)


def rows_of(num_rows: int) -> Rows:
    x = torch.zeros(num_rows, WIDTH, dtype=torch.float16)
    return Rows(x[None].to(torch.int8), torch.zeros(4, num_rows), x.dtype, x)


def test_arguments_stand_in_the_kernel_s_order(library: Driver) -> None:
    """Maps of x and codes, x's steps, the weight's, x, bitmap, codes, y, sums, arrived, x_out, gathered."""
    multiply, rows = bound(), rows_of(50)
    y = multiply(rows)
    assert y.shape == (50, OUTS)
    assert rows.x is not None
    of_codes, of_rows = library.maps
    variant = multiply.rows[1].variant
    assert of_rows == Map(BYTES, rows.codes.data_ptr(), [WIDTH, 50], [WIDTH], [128, variant.tile])
    assert of_codes == Map(
        BYTES, multiply.weight.codes.data_ptr(), [WIDTH, OUTS], [WIDTH], [128, variant.outputs]
    )
    told = library.launches[0]
    config = told.config
    workspace = multiply.workspace
    assert told.pointers(range(2, 12)) == [
        rows.scales.data_ptr(),
        multiply.weight.steps.data_ptr(),
        rows.x.data_ptr(),
        multiply.marks.bitmap.data_ptr(),
        multiply.weight.codes.data_ptr(),
        y.data_ptr(),
        workspace.sums.data_ptr(),
        workspace.arrived.data_ptr(),
        rows.x.data_ptr(),
        workspace.gathered.data_ptr(),
    ]
    blocks, shared = variant.work(50, OUTS, WIDTH, 13)
    assert shared == 32 % 13
    assert told.integers(range(12, 17)) == [50, OUTS, WIDTH, shared, cuda.GATHERED_COLUMNS]
    assert told.floats([17]) == [6.0]
    assert (config.grid_x, config.block_x, config.stream) == (blocks, 384, STREAM)
    assert config.shared_bytes == variant.shared_bytes
    assert workspace.sums.numel() >= 13 * variant.sums_of_block


def test_a_call_s_rows_choose_the_variant(library: Driver) -> None:
    multiply = bound()
    for num_rows in (17, 32, 33, 64, 65, 128, 200, 257, 1000):
        multiply(rows_of(num_rows))
        variant = next(r.variant for r in multiply.rows if r.max_rows is None or num_rows <= r.max_rows)
        told = library.launches[-1]
        assert told.config.shared_bytes == variant.shared_bytes
        gathers = told.pointers(range(4, 5)) != told.pointers(range(10, 11))
        assert gathers == (num_rows > 64)


@pytest.mark.parametrize(
    ("changes", "threshold"),
    [({"threshold": 5.5}, 5.5), ({"by_row": 0}, 0.0), ({"threshold": 0.0}, float("inf"))],
)
def test_from_where_on_a_number_counts(library: Driver, changes: dict[str, float], threshold: float) -> None:
    bound(**changes)(rows_of(20))
    assert library.launches[0].floats([17]) == [threshold]


@pytest.mark.parametrize("num_before", [4, 7, 13])
def test_marks_are_clean_wherever_the_step_before_ended(library: Driver, num_before: int) -> None:
    """Each layer clears what the one before it has marked, and the first all that a step can leave behind."""
    bounds = [bound(number) for number in range(16)]
    layers, bitmaps = [layer.marks for layer in bounds], bounds[0].workspace.bitmaps
    assert all(layer.workspace is bounds[0].workspace for layer in bounds)
    for step in (layers, layers[:num_before], layers):
        for marks in step:
            marks.spent.zero_()
            assert not marks.bitmap.any()
            marks.bitmap.fill_(1)
    assert sum(int(bitmap.any()) for bitmap in bitmaps) == 1


def test_a_bias_is_added(library: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "new_empty", Tensor.new_zeros)
    bias = torch.randn(OUTS).half()
    assert torch.equal(bound(bias=bias)(rows_of(20)), bias.expand(20, -1))


def test_fp8_tells_nothing_of_outliers(library: Driver) -> None:
    """x, its bitmap and gathered columns are nowhere; the sums of a tile's parts are its own."""
    multiply, (codes, scales) = bound_fp8(), fp8_rows_of(50)
    y = multiply(codes, scales)
    assert (y.shape, y.dtype) == ((50, OUTS), torch.bfloat16)
    weight, workspace, variant = multiply.weight, multiply.workspace, multiply.rows[1].variant
    of_codes, of_rows = library.maps
    assert of_rows == Map(BYTES, codes.data_ptr(), [WIDTH, 50], [WIDTH], [128, variant.tile])
    assert of_codes == Map(BYTES, weight.codes.data_ptr(), [WIDTH, OUTS], [WIDTH], [128, variant.outputs])
    told = library.launches[0]
    config = told.config
    given = [scales.data_ptr(), weight.steps.data_ptr(), 0, 0, weight.codes.data_ptr()]
    left = [y.data_ptr(), workspace.sums.data_ptr(), workspace.arrived.data_ptr(), 0]
    assert told.pointers(range(2, 11)) == [*given, *left]
    assert told.integers(range(12, 16)) == [50, OUTS, WIDTH, 32 % 13]
    assert (config.grid_x, config.block_x, config.stream) == (13, 288, STREAM)
    assert config.shared_bytes == variant.shared_bytes
    assert workspace.sums.numel() >= 13 * variant.sums_of_block
    assert workspace is not bound().workspace


def test_fp8_s_rows_choose_the_variant(library: Driver) -> None:
    multiply = bound_fp8()
    for num_rows, tile in ((1, 16), (16, 16), (33, 64), (64, 64)):
        multiply(*fp8_rows_of(num_rows))
        assert library.maps[-1].box == [128, tile]
    for num_rows in (17, 32, 65):
        with pytest.raises(AssertionError):
            multiply(*fp8_rows_of(num_rows))


def test_what_the_kernel_would_misread_is_not_launched(library: Driver) -> None:
    codes, scales = fp8_rows_of(3)
    for wrong in (codes.view(torch.int8), codes[:, :16].contiguous()):
        with pytest.raises(AssertionError):
            bound_fp8()(wrong, scales)
    assert not library.launches
