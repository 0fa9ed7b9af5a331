"""gate_up of many rows and the gate in one: whom the kernel serves, what a call says, what it computes."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels import gated_linear
from service.kernels import launch as launching
from service.kernels.cuda import Program, driver
from service.kernels.gated_linear import Variant, cuda, plan, reference, variant_of
from service.kernels.gated_silu.reference import gated_silu
from tests.kernels.emulated import box, build, pointer
from tests.kernels.told_driver import STREAM, Driver, Kernel, Map, stand_in

H100_PAIRS, LLAMA_8B = 66, 14336
NUM_ARGUMENTS, NUMBERS = 6, range(3, 6)
FLOAT16 = driver.MAP_TYPES[torch.float16]
ORDERS = (0, 11, 2026)  # seeds by which blocks are held up
ERROR = {0: 6e-4, 1: 5e-3}  # relative, in norm, by BF16: three roundings
RUN = """void run(int order, int grid, TensorMap* x, TensorMap* w, TensorMap* y, int rows, int columns,
    int k) {
    emulated_order = order;
    emulate(grid, PAIR_OF_BLOCKS, THREADS, [=] { gated_tile(*x, *w, *y, rows, columns, k); }); }"""
# (type, rows, outputs, inputs, blocks)
CASES = [
    (0, 200, 264, 456, 4),  # a tile of which nearly nothing is there, several a block
    (1, 333, 136, 328, 2),  # all tiles one pair's, of which the last rows are half empty
    (0, 300, 200, 64, 8),  # one step a tile; more blocks than tiles
    (1, 130, 72, 200, 2),  # fewer steps than stages
]
# What is planted, and the places that change; CASES[0] is to find it.
FAULTS: dict[str, tuple[tuple[str, str], ...]] = {
    "a stage is given back while the tensor cores read it": (
        ("wgmma_wait<1>();\n            if (step > 0) give_back();", "give_back(), wgmma_wait<1>();"),
        ("wgmma_wait<0>();\n        give_back();", "wgmma_wait<0>();"),
    ),
    "a block writes into the other's stages when its own are free": (
        ("WARPS * PAIR_OF_BLOCKS);\n        }", "WARPS);\n        }"),
        ("if (lane < PAIR_OF_BLOCKS) arrive_in_pair(here + EMPTY + 8 * done, lane)",
         "if (lane == 0) barrier_arrive(here + EMPTY + 8 * done)"),
    ),
    "a piece of y is overwritten before it has left": (("if (lane == 0) stores_wait_read<1>();", ""),),
    "the block ends before y is written": (("if (lane == 0) stores_wait<0>();", ""),),
}  # fmt: skip


def problem(bf16: int, num_rows: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if bf16 else torch.float16
    weight = (torch.randn(2 * outputs, inputs) * 2 / inputs**0.5).to(dtype)
    return torch.randn(num_rows, inputs).to(dtype), weight


def computed(library: Any, x: Tensor, weight: Tensor, blocks: int, order: int) -> Tensor:
    """y, with a row more than should be touched."""
    (num_rows, inputs), outputs = x.shape, len(weight) // 2
    y = torch.full((num_rows + 1, outputs), float("nan"), dtype=x.dtype)
    of_x = box(x, (num_rows, inputs), plan.TILE_ROWS, plan.INPUTS, swizzled=1)
    of_weight = box(weight, (2 * outputs, inputs), plan.TILE_OUTPUTS, plan.INPUTS, swizzled=2)
    of_y = box(y, (num_rows, outputs), plan.PIECE_ROWS, plan.PIECE_OUTPUTS, swizzled=1)
    library.run(order, blocks, *map(pointer, (of_x, of_weight, of_y)), num_rows, outputs, inputs)
    return y


def wanted(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x.double() @ weight.double().t()).chunk(2, -1)
    return F.silu(gate) * up


def is_right(y: Tensor, x: Tensor, weight: Tensor) -> bool:
    want = wanted(x, weight)
    error = float((y[: len(x)].double() - want).norm() / want.norm())
    return error < ERROR[int(x.dtype is torch.bfloat16)] and bool(torch.isnan(y[len(x)]).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_is_the_gate_of_the_product(dtype: torch.dtype) -> None:
    x, weight = problem(int(dtype is torch.bfloat16), 5, 24, 64)
    y = reference.gated_linear(x, weight)
    assert torch.equal(y, gated_silu(F.linear(x, weight)))
    assert (y.double() - wanted(x, weight)).norm() < ERROR[int(dtype is torch.bfloat16)] * y.double().norm()


needs_gcc = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the kernel")


@needs_gcc
@pytest.mark.parametrize(("bf16", "num_rows", "outputs", "inputs", "blocks"), CASES)
def test_it_computes_the_same_bits_in_whatever_order_blocks_come(
    tmp_path: Path, bf16: int, num_rows: int, outputs: int, inputs: int, blocks: int
) -> None:
    x, weight = problem(bf16, num_rows, outputs, inputs)
    library = build(Variant(bf16).program, tmp_path, RUN)
    found = [computed(library, x, weight, blocks, order) for order in ORDERS[:2]]
    assert is_right(found[0], x, weight)
    assert torch.equal(*(y[:num_rows] for y in found))
    # its exponential is not torch's: a rounding apart now and then
    assert (gated_linear.gated_linear(x, weight) != found[0][:num_rows]).float().mean() < 0.02


def planted(folder: Path, places: tuple[tuple[str, str], ...]) -> Any:
    right, text = Variant(CASES[0][0]).program, (plan.FOLDER / "gated_tile.cu").read_text()
    for old, new in places:
        assert text.count(old) == 1
        text = text.replace(old, new)
    source = folder / "gated_tile.cu"
    source.write_text(text)
    return build(Program(source, right.kernel, right.definitions), folder, RUN)


@needs_gcc
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_is_found(tmp_path: Path, fault: str) -> None:
    library, blocks = planted(tmp_path, FAULTS[fault]), CASES[0][-1]
    x, weight = problem(*CASES[0][:-1])
    found = [is_right(computed(library, x, weight, blocks, order), x, weight) for order in ORDERS]
    assert not all(found)


@needs_gcc
def test_x_fetched_before_its_maker_is_over_is_found(tmp_path: Path) -> None:
    """The emulated machine ends there."""
    library = planted(tmp_path, (("            await_predecessor();\n            for", "for"),))
    case = f"computed(ctypes.CDLL({library._name!r}), *problem(*CASES[0][:-1]), CASES[0][-1], 0)"
    command = f"import ctypes; from tests.kernels.test_gated_linear import *; {case}"
    assert subprocess.run([sys.executable, "-c", command]).returncode == -signal.SIGABRT


def test_which_numbers_of_rows_it_serves() -> None:
    """Those that were measured, and between them those that leave no more of a round empty."""
    served = plan.served_rows(LLAMA_8B, H100_PAIRS)
    assert {768, 896, 1024, 1536, 2048} <= served
    assert not served & {1, 512, 640, 767, 769, 832, 1025, 2049, 8192}
    assert plan.fullness(1024, LLAMA_8B, H100_PAIRS) == pytest.approx(448 / (7 * 66))
    assert not plan.served_rows(64, H100_PAIRS), "too few outputs for all multiprocessors"


def test_which_shapes_it_serves() -> None:
    for dtype in plan.DTYPES:
        assert variant_of(28672, 4096, dtype) == Variant(int(dtype is torch.bfloat16))
    assert variant_of(28672, 4096, torch.float32) is None
    assert variant_of(28672 + 8, 4096, torch.float16) is None, "rows of y begin anywhere"
    assert variant_of(28672, 4100, torch.float16) is None
    assert variant_of(28672, 1024, torch.float16) is None
    assert Variant(0).shared_bytes <= 227 << 10


def test_on_a_cpu_nobody_is_bound_to_it() -> None:
    assert gated_linear.bind(torch.zeros(4096, 2048, dtype=torch.float16)) is None


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = stand_in(monkeypatch, cuda, NUM_ARGUMENTS)
    monkeypatch.setattr(cuda, "load", lambda variant: Kernel(variant, plan.THREADS))
    return found


def test_what_a_call_tells(library: Driver) -> None:
    """Maps of weight, x and y; rows, outputs, inputs. Those of another x are its own."""
    weight = torch.zeros(2 * 136, 320, dtype=torch.float16)
    multiply = cuda.Bound(weight, Variant(0))
    x = torch.zeros(200, 320, dtype=torch.float16)
    y = multiply(x)
    assert y.shape == (200, 136)
    told = library.launches[0]
    config = told.config
    assert (config.grid_x, config.block_x, config.stream) == (12, plan.THREADS, STREAM)
    assert config.shared_bytes == Variant(0).shared_bytes
    assert told.integers(NUMBERS) == [200, 136, 320]
    of_weight, of_x, of_y = library.maps
    assert of_weight == Map(FLOAT16, weight.data_ptr(), [320, 272], [640], [64, 128])
    assert of_x == Map(FLOAT16, x.data_ptr(), [320, 200], [640], [64, 128])
    assert of_y == Map(FLOAT16, y.data_ptr(), [136, 200], [272], [64, 16])
    multiply(torch.zeros(7, 320, dtype=torch.float16))
    assert library.launches[1].integers(NUMBERS) == [7, 136, 320]
    assert len(library.maps) == 5
    assert multiply(x[:0]).shape == (0, 136)
    assert len(library.launches) == 2


def test_what_is_checked_before_anybody_is_served(library: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least number of rows, and one that leaves a tile empty in part."""
    monkeypatch.setattr(cuda, "multiprocessors", lambda: 2 * H100_PAIRS)
    weight = torch.zeros(2 * LLAMA_8B, 8, dtype=torch.float16)
    least, ragged = cuda.Bound(weight, Variant(0)).checked
    assert least == 768
    assert ragged % plan.TILE_ROWS
    assert {least, ragged} <= plan.served_rows(LLAMA_8B, H100_PAIRS)


@pytest.mark.parametrize("dependent", [True, False])
def test_it_comes_before_its_predecessor_ends_where_that_is_on(
    library: Driver, monkeypatch: pytest.MonkeyPatch, dependent: bool
) -> None:
    monkeypatch.setattr(launching, "DEPENDENT", dependent)
    cuda.Bound(torch.zeros(16, 64, dtype=torch.float16), Variant(0))(torch.zeros(1, 64).half())
    assert library.launches[-1].config.num_attributes == int(dependent)
