"""Runs production's W4 kernels on a CPU (tests/kernels/emulated.py) against float64 on small shapes. A minute.

python docs/experiments/w4_emulate.py [few] [tile] [variants]
"""

import ctypes
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor
from w4_problem import Problem, make_parts
from w4_variants import WIDE, Kernel, all_kernels

from service.kernels.cuda import Program
from tests.kernels.emulated import box, build, pointer

RUNS = {
    "few": """void run(int grid, const char* codes, const char* scales, const char* zeros, const float* nested,
        const float* map, const char* x, char* y, int rows, int n, int width, int k, Parts* parts) {
        emulate(grid, 1, THREADS, [=] { w4_few(codes, scales, zeros, nested, map, x, y, rows, n, width, k, *parts); }); }""",
    "tile": """void run(int order, int grid, TensorMap* x, TensorMap* codes, const char* scales, const char* zeros,
        const float* nested, const float* map, char* y, float* workspace, uint32_t* flags, int rows, int n, int width, int k,
        Parts* parts) {
        emulated_order = order;
        emulate(grid, grid, THREADS, [=] {
            w4_tile(*x, *codes, scales, zeros, nested, map, y, workspace, flags, rows, n, width, k, *parts); }); }""",
}


def report(label: str, got: Tensor, want: Tensor) -> bool:
    error = float((got.double() - want).norm() / want.norm())
    fine = error < (6e-4 if got.dtype == torch.float16 else 4e-3)
    print(f"{'ok  ' if fine else 'BAD '} {error:.1e}  {label}", flush=True)
    return fine


def check_one(kernel: Kernel, problem: Problem, blocks: int, rows: int, width: int = 0) -> bool:
    v = kernel.values
    program = Program(kernel.source, f"w4_{kernel.family}", tuple(kernel.definitions.items()))
    library = build(program, Path(tempfile.mkdtemp(prefix="w4_")), RUNS[kernel.family])
    operands = problem.affine if kernel.affine else problem.nf4
    n, k = problem.n, problem.k
    width = width or n
    dtype = torch.bfloat16 if v["BF16"] else torch.float16
    x = torch.randn(rows, k).to(dtype)
    y = torch.full((rows, width), float("nan"), dtype=dtype)
    parts = ctypes.byref(make_parts(problem))
    label = f"{'affine' if kernel.affine else 'nf4'} {kernel.label} M={rows} N={n} K={k}"
    want = (x.double() @ problem.dense(kernel.affine).double().t())[:, :width]
    if kernel.family == "few":
        library.run(blocks, *(pointer(t) for t in (*operands, problem.map, x, y)), rows, n, width, k, parts)
        return report(label, y, want)
    codes, *rest = operands
    x_map = box(x, (rows, k), v["TILE"], 64, swizzled=1)
    words = codes.view(torch.int32).view(n // 16, -1)
    code_map = box(words, (n // 16, k * 2), kernel.outputs // 16, 128 * v["KS"], swizzled=0)
    workspace = torch.full((blocks, kernel.outputs * v["TILE"]), float("nan"))
    flags = torch.zeros(blocks, dtype=torch.int32)
    outputs = []
    for order in (0, 1 + rows, 77 + n):  # on one workspace, as launches follow each other
        y.fill_(float("nan"))
        pointers = (pointer(t) for t in (x_map, code_map, *rest, problem.map, y, workspace, flags))
        library.run(order, blocks, *pointers, rows, n, width, k, parts)
        outputs.append(y.clone())
        workspace.fill_(float("nan"))
    if not all(torch.equal(outputs[0], y) for y in outputs):
        print(f"BAD  bits depend on the order of blocks: {label}")
        return False
    return report(f"{label} blocks={blocks} flags={flags.unique().tolist()}", y, want)


def check_few() -> bool:
    fine = True
    for affine in (0, 1):
        for *config, n, beyond, k, blocks, rows, bf16 in (
            (16, 3, 1, 80, 0, 4096, 2, 1, 0),
            (16, 4, 2, 96, 8, 1920, 3, 8, 1),  # fifteen chunks for sixteen warps
            (8, 3, 2, 64, 0, 2688, 1, 3, 0),  # warps with two chunks and with three
            (16, 3, 1, 48, 0, 1152, 2, 13, 0),  # two tiles of rows
            (16, 3, 2, 48, 8, 512, 5, 2, 1),  # more warps than chunks, more blocks than work
        ):
            problem = Problem(n, k, "cpu", parts=(n - 32, 16, 16))
            fine &= check_one(
                Kernel("few", affine, (*config, 1, 1 + (rows > 8), int(not affine and rows < 8), bf16)),
                problem,
                blocks,
                rows,
                n - beyond,
            )
    return fine


def check_tile() -> bool:
    fine = True
    for affine in (0, 1):
        # config, outputs beyond whole tiles, K, blocks, rows, bfloat16
        for *config, tiles, beyond, k, blocks, rows, bf16 in (
            (8, 1, 4, 2, 3, 1, 0, 1, 1, 0, 1280, 3, 1, 0),  # ten units, three shares
            (8, 1, 2, 2, 4, 2, 1, 1, 3, 32, 512, 7, 7, 1),
            (16, 1, 4, 2, 3, 1, 0, 1, 2, 0, 640, 12, 13, 0),  # more blocks than units
            (16, 1, 4, 2, 6, 1, 1, 1, 2, 0, 640, 12, 13, 0),
            (16, 2, 2, 2, 3, 1, 0, 1, 2, 0, 384, 5, 11, 1),
            (32, 1, 2, 2, 3, 2, 1, 1, 4, 96, 384, 3, 32, 0),  # whole tiles, then cut ones
            (64, 1, 4, 2, 3, 1, 1, 0, 2, 0, 512, 3, 60, 0),  # two tiles on three blocks
            (64, 1, 3, 2, 4, 1, 0, 0, 1, 0, 512, 4, 60, 0),
            (64, 2, 2, 2, 4, 1, 1, 0, 1, 32, 640, 4, 64, 1),
            (128, 1, 3, 1, 3, 1, 1, 0, 2, 0, 512, 3, 200, 0),
            (128, 2, 2, 1, 6, 1, 0, 0, 1, 0, 512, 3, 300, 0),  # whole tiles only
            (256, 1, 2, 1, 3, 1, 0, 0, 2, 64, 512, 6, 250, 1),
        ):
            wide_table = int(not affine and config[5] == 1 and config[4] > 3)
            kernel = Kernel("tile", affine, (*config, 1, wide_table, bf16))
            n = kernel.outputs * tiles + beyond
            problem = Problem(n, k, "cpu", parts=(n - 64, 16, 48))
            fine &= check_one(kernel, problem, blocks, rows, n - 8 if beyond else 0)
    return fine


def check_variants() -> bool:
    """Every variant that the experiment runs, on as few outputs as it takes."""
    fine = True
    for kernel in all_kernels([*WIDE]):
        v = kernel.values
        if kernel.family == "few":
            fine &= check_one(kernel, Problem(32, 4096, "cpu", parts=(16, 16)), 1, 2)
        elif kernel.family == "tile":
            n = kernel.outputs
            problem = Problem(n, 128 * v["KS"] * (1 + v["STAGES"] // 2), "cpu", parts=(n - 64, 64))
            fine &= check_one(kernel, problem, 2, v["TILE"] - 5)
    return fine


def main() -> None:
    wanted = sys.argv[1:] or ["few", "tile"]
    np.seterr(all="raise")
    torch.manual_seed(1)
    checks = {"few": check_few, "tile": check_tile, "variants": check_variants}
    results = [checks[name]() for name in wanted]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
