"""The very W8A8 kernel that a GPU runs, compiled with g++ for a machine made of fibers (machine_emulator.h).

It shows numbers, barriers, buffers given back too early and addresses that a GPU would refuse; not what a
compiler for the GPU makes of it, nor speed.
"""

import shutil
from ctypes import c_float
from pathlib import Path

import pytest
import torch

from service.kernels.w8_linear.variants import STEP, Tile
from tests.kernels.emulated import box, build, pointer
from tests.kernels.w8_problem import THRESHOLD, fp8_problem, problem

RUN = (
    "void run(int order, int grid, int threads, TensorMap* x, TensorMap* codes, const float* x_steps,"
    " const float* steps, const uint16_t* x16, const uint32_t* bitmap, const int8_t* w, char* y,"
    " float* sums, int* arrived,"
    " uint16_t* x_out, int* gathered, int rows, int n, int k, int shared_tiles, int x_out_columns,"
    " float threshold) { emulated_order = order; emulate(grid, grid, threads, [=] {"
    " w8_tile(*x, *codes, x_steps, steps, x16, bitmap, w, y, sums, arrived, x_out, gathered, rows, n, k,"
    " shared_tiles, x_out_columns, threshold); }); }"
)
GATHERED_COLUMNS = 64
# (variant, rows, outputs, input features, columns with outliers, blocks): ragged ends, shared tiles, lists
# longer than the room for codes and for gathered columns
CASES = [
    (Tile("int8", 0, 32, 1, 3, 32, cuts=True), 33, 160, 1040, 3, 7),
    (Tile("int8", 0, 64, 1, 4, 128), 50, 384, 512, 300, 2),
    (Tile("int8", 1, 64, 2, 2, 64, cuts=True), 70, 272, 512, 100, 3),
    (Tile("int8", 0, 128, 1, 3, 64, cuts=True), 200, 256, 640, 20, 3),
    (Tile("int8", 0, 128, 2, 2, 32), 130, 256, 384, 100, 3),
    (Tile("int8", 0, 256, 1, 2, 32), 300, 144, 256, 0, 3),
    (Tile("fp8", 1, 16, 1, 3, cuts=True), 9, 272, 656, 0, 4),
    (Tile("fp8", 1, 32, 1, 4, cuts=True), 21, 144, 1040, 0, 7),
    (Tile("fp8", 1, 64, 2, 2), 40, 272, 784, 0, 2),
    (Tile("fp8", 1, 64, 1, 3, cuts=True), 64, 128, 1536, 0, 5),
]
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="no g++, which compiles the kernel for the emulator"
)


@needs_compiler
@pytest.mark.parametrize(
    ("variant", "num_rows", "outs", "width", "count", "most_blocks"),
    CASES,
    ids=[f"{case[0].name} {case[4]}" for case in CASES],
)
def test_it_computes_what_codes_and_outliers_mean(
    tmp_path: Path, variant: Tile, num_rows: int, outs: int, width: int, count: int, most_blocks: int
) -> None:
    """In whatever order blocks come: each time the same bits."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if variant.bf16 else torch.float16
    is_int8 = variant.codes == "int8"
    sizes = num_rows, outs, width
    given = problem(*sizes, count, dtype) if is_int8 else fp8_problem(*sizes, dtype)
    want, library = given.wanted(), build(variant.program, tmp_path, RUN)
    blocks, shared = variant.work(num_rows, outs, width, most_blocks)
    assert bool(shared) == variant.cuts
    arrived, gathered = torch.zeros(most_blocks, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    maps = (
        box(given.x_codes, (num_rows, width), variant.tile, STEP, swizzled=1),
        box(given.codes, (outs, width), variant.outputs, STEP, swizzled=2),
    )
    # fp8 has no outliers, and is told nothing of them
    x16, bitmap = (given.x, given.bitmap) if is_int8 else (None, None)
    first: torch.Tensor | None = None
    for order in (0, 5):
        y = torch.full((num_rows + 1, outs), float("nan"), dtype=dtype)
        sums = torch.full((blocks * variant.sums_of_block,), float("nan"))
        x_out = torch.full((num_rows, GATHERED_COLUMNS), float("nan"), dtype=dtype)
        told = (
            *maps, given.x_steps, given.steps, x16, bitmap, given.codes, y, sums, arrived, x_out,
            gathered,
        )  # fmt: skip
        numbers = num_rows, outs, width, shared, GATHERED_COLUMNS, c_float(THRESHOLD)
        library.run(order, blocks, variant.threads, *map(pointer, told), *numbers)
        assert torch.isnan(y[num_rows]).all()
        assert (y[:num_rows].double() - want).norm() < (3e-3 if variant.bf16 else 4e-4) * want.norm()
        assert not arrived.any()
        assert not gathered.any()
        first = y if first is None else first
        assert torch.equal(y[:num_rows], first[:num_rows])


@needs_compiler
def test_a_broken_row_of_fp8_spares_the_others(tmp_path: Path) -> None:
    """Its codes are NaN: so are its results, and nobody else's."""
    torch.manual_seed(0)
    variant = Tile("fp8", 1, 16, 1, 3, cuts=True)
    num_rows, outs, width = 5, 128, 512
    given = fp8_problem(num_rows, outs, width, torch.bfloat16)
    given.x_codes[2] = torch.tensor(float("nan")).to(torch.float8_e4m3fn)
    library, blocks = build(variant.program, tmp_path, RUN), 3
    y, sums = torch.empty(num_rows, outs, dtype=torch.bfloat16), torch.empty(blocks * variant.sums_of_block)
    counters = torch.zeros(blocks, dtype=torch.int32)
    maps = (
        box(given.x_codes, (num_rows, width), variant.tile, STEP, swizzled=1),
        box(given.codes, (outs, width), variant.outputs, STEP, swizzled=2),
    )
    told = *maps, given.x_steps, given.steps, None, None, given.codes, y, sums, counters, None, None
    library.run(0, blocks, variant.threads, *map(pointer, told), num_rows, outs, width, 1, 0, c_float(0))
    assert y.isnan().all(1).tolist() == [False, False, True, False, False]
    assert y.isfinite().all(1).tolist() == [True, True, False, True, True]
