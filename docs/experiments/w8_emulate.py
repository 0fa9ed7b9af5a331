"""Runs production's w8_tile.cu on a CPU (tests/kernels/emulated.py) against float64 on small shapes; no GPU, no CUDA. A minute.

python docs/experiments/w8_emulate.py
"""

import ctypes
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from w8_problem import Problem
from w8_variants import STEP, Kernel, cut

from tests.kernels.emulated import box, build, pointer

RUN = """void run(int grid, int threads, TensorMap* x, TensorMap* w_map, const float* x_steps, const float* w_steps,
    const uint16_t* x16, const uint32_t* bitmap, const int8_t* w, char* y, float* workspace, int* arrived, uint16_t* x_out,
    int* gathered, int rows, int n, int k, int stream_tiles, int x_out_columns, float threshold) {
    emulated_order = 1;  // blocks are held up at random
    emulate(grid, grid, threads, [=] {
        w8_tile(*x, *w_map, x_steps, w_steps, x16, bitmap, w, y, workspace, arrived, x_out, gathered, rows, n, k, stream_tiles,
                x_out_columns, threshold); }); }"""
X_OUT_COLUMNS = 64


def check(kernel: Kernel, library: ctypes.CDLL, problem: Problem, how: str, multiprocessors: int) -> bool:
    n, k, rows = problem.n, problem.k, problem.rows
    blocks, stream = cut(kernel, how, n, k, rows, multiprocessors)
    y = torch.full((rows, n), float("nan"), dtype=problem.dtype)
    workspace = torch.full((kernel.workspace_bytes(blocks) // 4,), float("nan"))
    arrived = torch.zeros(kernel.tiles(n, rows), dtype=torch.int32)
    x_out = torch.full((rows, X_OUT_COLUMNS), float("nan"), dtype=problem.dtype)
    gathered = torch.zeros(2, dtype=torch.int32)
    w, x, x_steps = problem.operands(kernel.fp8)
    tensors = (
        x_steps,
        problem.w_steps,
        problem.x16,
        problem.bitmap,
        w,
        y,
        workspace,
        arrived,
        x_out,
        gathered,
    )
    maps = (
        box(x, (rows, k), kernel.tile, STEP, swizzled=1),
        box(w, (n, k), kernel.outputs, STEP, swizzled=2),
    )
    library.run(
        blocks,
        kernel.threads,
        *map(pointer, (*maps, *tensors)),
        rows,
        n,
        k,
        stream,
        X_OUT_COLUMNS,
        ctypes.c_float(problem.threshold),
    )
    want = problem.want(kernel.fp8)
    error = float((y.double() - want).norm() / want.norm())
    fine = error < (3e-3 if kernel.bf16 else 4e-4) and not arrived.any() and not gathered.any()
    print(f"{'ok  ' if fine else 'BAD '} {error:.1e}  {kernel.file} {how} of {multiprocessors}, M={rows} N={n} K={k}, "
          f"{problem.count} columns", flush=True)  # fmt: skip
    return fine


CASES = (
    # kernel, rows, n, k, columns, how, multiprocessors
    (Kernel(0, 16, 1, 3, 64), 5, 272, 640, 40, "all", 4),
    (Kernel(0, 16, 1, 5, 64, 2, bf16=1), 16, 256, 512, 50, "all", 3),
    (Kernel(0, 16, 1, 3, 64), 16, 256, 512, 0, "whole", 3),
    (Kernel(0, 32, 1, 3, 32), 33, 160, 1040, 3, "all", 7),
    (Kernel(0, 64, 1, 4, 128), 64, 384, 1024, 300, "rest", 2),
    (Kernel(0, 64, 1, 4, 128), 100, 128, 1536, 1536, "all", 5),
    (Kernel(0, 64, 2, 2, 64), 70, 272, 512, 30, "all", 3),
    (Kernel(0, 64, 2, 2, 64), 70, 272, 512, 100, "rest", 3),
    (Kernel(0, 128, 1, 3, 64), 200, 256, 768, 20, "rest", 3),
    (Kernel(0, 128, 1, 3, 64, bf16=1), 150, 256, 768, 90, "all", 5),
    (Kernel(0, 128, 2, 2, 32), 130, 256, 512, 100, "all", 3),
    (Kernel(0, 128, 2, 2, 32), 190, 512, 384, 30, "whole", 3),
    (Kernel(0, 256, 1, 2, 32), 300, 144, 512, 70, "all", 3),
    (Kernel(1, 16, 1, 3), 9, 272, 640, 0, "all", 4),
    (Kernel(1, 64, 2, 3, bf16=1), 64, 256, 384, 0, "whole", 1),
)


def main() -> None:
    torch.manual_seed(1)
    fine = True
    built: dict[Kernel, ctypes.CDLL] = {}
    for kernel, rows, n, k, count, how, multiprocessors in CASES:
        if kernel not in built:
            built[kernel] = build(kernel.program, Path(tempfile.mkdtemp(prefix="w8_")), RUN)
        fine &= check(
            kernel, built[kernel], Problem(rows, n, k, count, "cpu", bf16=kernel.bf16), how, multiprocessors
        )
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
