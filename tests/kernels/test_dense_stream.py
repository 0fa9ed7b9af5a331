"""The 16-bit linear of few rows in CUDA C++: whom it serves, what a call tells it, and what it computes."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels import dense_linear
from service.kernels import launch as launching
from service.kernels.cuda import driver
from service.kernels.dense_linear import Variant, cuda, few_rows, plan
from service.kernels.dense_linear.few_rows import Entry
from tests.kernels.emulated import box, build, pointer
from tests.kernels.told_driver import MULTIPROCESSORS, STREAM, Driver, Map, stand_in

TABLE = (
    Entry(8, 2048, Variant(8, 1, 1, 2, 3)),
    Entry(32, 65536, Variant(16, 1, 1, 2, 3)),
    Entry(64, 2048, Variant(64, 1, 2, 1, 3, share=2)),
)
NUM_ARGUMENTS, POINTERS, NUMBERS = 8, range(2, 5), range(5, 8)
FLOAT16 = driver.MAP_TYPES[torch.float16]
RUN = """void run(int order, int grid, TensorMap* x, TensorMap* w, const uint16_t* bias, char* y, float* sums,
    int rows, int n, int k) {
    emulated_order = order;
    emulate(grid, grid, THREADS, [=] { dense_stream(*x, *w, bias, y, sums, rows, n, k); });
    launch_over(); }"""
# (variant, rows, outputs, inputs, blocks): ragged ends, tiles cut and whole, more blocks than steps, pairs
CASES = [
    (Variant(8, 1, 2, 2, 3), 3, 136, 392, 5),
    (Variant(8, 1, 1, 4, 2), 2, 72, 320, 11),
    (Variant(16, 1, 1, 2, 3, bf16=1), 37, 448, 256, 4),
    (Variant(64, 1, 2, 1, 3, share=2), 50, 520, 320, 4),
    (Variant(64, 2, 2, 1, 3, share=2, bf16=1), 33, 512, 256, 6),
]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.kernels.dense_linear.few_rows.TABLE", TABLE)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the kernel for the emulator")
@pytest.mark.parametrize(("variant", "num_rows", "out", "width", "blocks"), CASES, ids=lambda case: str(case))
def test_it_computes_the_same_bits_in_whatever_order_blocks_come(
    tmp_path: Path, variant: Variant, num_rows: int, out: int, width: int, blocks: int
) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if variant.bf16 else torch.float16
    x, weight = torch.randn(num_rows, width).to(dtype), torch.randn(out, width).to(dtype)
    bias = torch.randn(out).to(dtype)
    library = build(variant.program, tmp_path, RUN)
    of_x = box(x, (num_rows, width), variant.tile // variant.share, 64, swizzled=1)
    of_weight = box(weight, (out, width), variant.outputs, 64, swizzled=2)
    sums = torch.full((blocks, variant.sums_of_block), cuda.ABSENT, dtype=torch.int32)
    want = x.double() @ weight.double().t() + bias.double()
    found: list[Tensor] = []
    for order in (0, 5):
        y = torch.full((num_rows + 1, out), float("nan"), dtype=dtype)
        told = map(pointer, (of_x, of_weight, bias, y, sums))
        library.run(order, blocks, *told, num_rows, out, width)
        assert torch.isnan(y[num_rows]).all()
        assert (sums == cuda.ABSENT).all(), "the next launch finds it empty"
        found.append(y[:num_rows])
    assert torch.equal(*found)
    assert (found[0].double() - want).norm() < (4e-3 if variant.bf16 else 6e-4) * want.norm()


def test_whom_it_serves(table: None) -> None:
    half = torch.float16
    assert [row.max_rows for row in plan(6144, 4096, half)] == [8, 64]
    assert [row.variant.bf16 for row in plan(128256, 4096, torch.bfloat16)] == [1, 1, 1]
    assert plan(6152, 4160, half), "its copy engine cuts tiles off"
    assert not plan(6144, 4096, torch.float32)
    assert not plan(960, 576, half), "small"
    assert not plan(6148, 4096, half), "rows of y that begin anywhere"
    assert not plan(6144, 4100, half)


def test_what_was_measured() -> None:
    """Llama-3.1-8B's head, its gate and up, its q, k and v; o and down are read faster by another kernel."""
    shapes = [(128256, 4096), (28672, 4096), (6144, 4096), (4096, 4096), (4096, 14336)]
    ends = [[row.max_rows for row in plan(*shape, torch.float16)] for shape in shapes]
    assert ends == [[8, 16, 32, 64], [8, 16, 32, 64], [8, 16, 32], [], []]


def test_variants_fit_the_device() -> None:
    for _, _, variant in few_rows.TABLE:
        assert variant.shared_bytes <= 227 << 10
        assert variant.threads <= 1024


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, table: None) -> Driver:
    monkeypatch.setattr(cuda, "_workspaces", {})
    return stand_in(monkeypatch, cuda, NUM_ARGUMENTS)


def bound(out: int = 2048, width: int = 4096, *, biased: bool = True) -> cuda.Bound:
    weight = torch.randn(out, width).half()
    return cuda.Bound(weight, torch.randn(out).half() if biased else None, plan(out, width, torch.float16))


def test_what_a_call_tells(library: Driver) -> None:
    """Maps of x and weight; bias, y, sums, rows, outputs, inputs."""
    multiply = bound()
    x = torch.randn(50, 4096).half()
    y = multiply(x)
    told, variant = library.launches[0], multiply.rows[1].variant
    config, sums = told.config, multiply._workspace.sums
    assert (config.grid_x, config.block_x, config.shared_bytes) == (12, variant.threads, variant.shared_bytes)
    assert config.stream == STREAM
    assert multiply.bias is not None
    assert told.pointers(POINTERS) == [multiply.bias.data_ptr(), y.data_ptr(), sums.data_ptr()]
    assert told.integers(NUMBERS) == [50, 2048, 4096]
    assert sums.numel() >= config.grid_x * variant.sums_of_block
    of_weight, of_x = library.maps
    assert of_weight == Map(FLOAT16, multiply.weight.data_ptr(), [4096, 2048], [8192], [64, variant.outputs])
    assert of_x == Map(FLOAT16, x.data_ptr(), [4096, 50], [8192], [64, 32]), "each of a pair fetches half"


def test_a_call_s_rows_choose_the_variant(library: Driver) -> None:
    multiply = bound(biased=False)
    for num_rows in (1, 8, 9, 64):
        multiply(torch.zeros(num_rows, 4096, dtype=torch.float16))
        wanted = TABLE[0].variant if num_rows <= 8 else TABLE[2].variant
        told = library.launches[-1]
        whole_pairs = MULTIPROCESSORS // wanted.share * wanted.share
        assert (told.config.shared_bytes, told.config.grid_x) == (wanted.shared_bytes, whole_pairs)
        assert told.pointers(POINTERS)[0] == 0, "no bias"


def test_more_rows_than_the_table_has_are_torch_s(library: Driver) -> None:
    multiply = bound()
    for num_rows in (0, 65):
        x = torch.randn(num_rows, 4096).half()
        assert torch.equal(multiply(x), F.linear(x, multiply.weight, multiply.bias))
    assert not library.launches


@pytest.mark.parametrize("dependent", [True, False])
def test_it_comes_before_its_predecessor_ends_where_that_is_on(
    library: Driver, monkeypatch: pytest.MonkeyPatch, dependent: bool
) -> None:
    monkeypatch.setattr(launching, "DEPENDENT", dependent)
    bound()(torch.zeros(1, 4096, dtype=torch.float16))
    assert library.launches[-1].config.num_attributes == int(dependent)


def test_on_a_cpu_nobody_is_bound_to_it(table: None) -> None:
    weight = torch.zeros(2048, 4096, dtype=torch.float16)
    assert dense_linear.plan_of(weight) == ()
