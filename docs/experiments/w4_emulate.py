"""Runs the W4 kernels on a CPU (w4_emulator.h) against float64 on small shapes; no GPU, no CUDA. A few minutes.

python docs/experiments/w4_emulate.py [few] [tile] [whole] [variants]
"""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from w4_problem import Problem, make_parts
from w4_variants import Kernel, all_kernels

HERE = Path(__file__).parent
DRIVERS = {
    "w4_few": """extern "C" void run(int grid, const char* codes, const char* scales, const char* zeros, const float* nested,
        const float* map, const char* x, char* y, int rows, int n, Parts* parts) {
        emulate(grid, CLUSTER, THREADS, [=] { w4_few(codes, scales, zeros, nested, map, x, y, rows, n, *parts); }); }""",
    "w4_tile": """extern "C" void run(int grid, TensorMap* x, TensorMap* codes, const char* scales, const char* zeros,
        const float* nested, const float* map, char* y, int rows, int n, int k, Parts* parts) {
        emulate(grid, CLUSTER, THREADS, [=] { w4_tile(*x, *codes, scales, zeros, nested, map, y, rows, n, k, *parts); }); }""",
    "w4_whole": """extern "C" void run(int grid, const char* codes, const char* scales, const char* zeros, const float* nested,
        const float* map, char* w, int first, int blocks, int n, int k, Parts* parts) {
        emulate(grid, 1, THREADS, [=] { w4_whole(codes, scales, zeros, nested, map, w, first, blocks, n, k, *parts); }); }""",
}


def build(name: str, defines: dict[str, int]) -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp(prefix="w4_"))
    source, library = folder / "driver.cpp", folder / "kernel.so"
    source.write_text(f'#include "{name}.cu"\n{DRIVERS[name]}\n')
    flags = [f"-D{key}={value}" for key, value in defines.items()]
    command = [
        "g++",
        "-std=c++17",
        "-O2",
        "-mavx2",
        "-mf16c",
        "-mfma",
        "-shared",
        "-fPIC",
        "-w",
        "-Wno-psabi",
        f"-I{HERE}",
    ]
    subprocess.run([*command, *flags, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.data_ptr() % 16 == 0
    return ctypes.c_void_p(tensor.data_ptr())


def box(tensor: Tensor, columns: int, rows: int, box_columns: int, box_rows: int, swizzled: bool) -> Tensor:
    size = tensor.element_size()
    fields = [tensor.data_ptr(), columns, rows, columns * size, size, box_columns, box_rows, int(swizzled)]
    return torch.tensor([*fields, *[0] * 8], dtype=torch.int64)


def report(label: str, got: Tensor, want: Tensor) -> bool:
    error = float((got.double() - want).norm() / want.norm())
    fine = error < 6e-4
    print(f"{'ok  ' if fine else 'BAD '} {error:.1e}  {label}", flush=True)
    return fine


def check_one(kernel: Kernel, problem: Problem, clusters: int, rows: int) -> bool:
    v = kernel.values
    library = build(
        f"w4_{kernel.family}", {**v, "AFFINE": kernel.affine, "SHARED_BYTES": kernel.shared_bytes}
    )
    operands = problem.affine if kernel.affine else problem.nf4
    n, k = problem.n, problem.k
    x = torch.randn(rows, k).half()
    y = torch.full((rows, n), float("nan"), dtype=torch.float16)
    parts = ctypes.byref(make_parts(problem))
    grid = clusters * kernel.cluster
    if kernel.family == "few":
        library.run(grid, *(pointer(t) for t in (*operands, problem.map, x, y)), rows, n, parts)
    else:
        codes, *rest = operands
        x_map = box(x, k, rows, 64, v["TILE"] // v["SHARE"], True)
        words = codes.view(torch.int32).view(n // 16, -1)
        code_map = box(words, k * 2, n // 16, 128 * v["KS"], 4 * v["RT"] * v["WGS"], False)
        library.run(grid, *(pointer(t) for t in (x_map, code_map, *rest, problem.map, y)), rows, n, k, parts)
    want = x.double() @ problem.dense(kernel.affine).double().t()
    return report(f"{'affine' if kernel.affine else 'nf4'} {kernel.label} M={rows} N={n} K={k}", y, want)


def check_few() -> bool:
    fine = True
    for affine in (0, 1):
        for *config, n, rows_tried in (
            (1, 4, 1, 2, 1, 3, 80, (1, 7)),
            (1, 8, 2, 1, 2, 4, 96, (16, 9)),
            (4, 2, 4, 2, 2, 4, 320, (16, 3)),
            (4, 14, 1, 2, 2, 3, 96, (16,)),
            (2, 7, 2, 4, 1, 4, 96, (1, 8)),
            (8, 7, 2, 2, 2, 4, 96, (13,)),
            (1, 16, 1, 2, 2, 4, 48, (16,)),
        ):
            kernel = Kernel("few", affine, tuple(config))
            cluster, kwarps, _, chunks, *_ = config
            problem = Problem(n, cluster * kwarps * chunks * 128, "cpu", parts=(n - 32, 16, 16))
            fine &= all([check_one(kernel, problem, 2, rows) for rows in rows_tried])
    return fine


def check_tile() -> bool:
    fine = True
    for affine in (0, 1):
        for *config, blocks, k, clusters, rows_tried in (
            (16, 1, 2, 2, 1, 1, 3, 2, 512, 2, (5, 16)),
            (64, 2, 2, 2, 1, 1, 4, 1, 512, 1, (50,)),
            (64, 2, 2, 2, 8, 1, 4, 1, 2048, 1, (64, 33)),
            (64, 2, 2, 2, 1, 2, 4, 2, 1536, 1, (64, 39)),
            (64, 1, 3, 2, 4, 1, 4, 1, 2048, 1, (61,)),
            (32, 2, 2, 2, 4, 1, 4, 2, 1024, 2, (17, 32)),
            (128, 1, 3, 1, 2, 2, 5, 2, 768, 2, (200,)),
            (128, 2, 2, 1, 1, 1, 4, 1, 768, 1, (256,)),
            (128, 2, 2, 1, 1, 2, 4, 4, 768, 2, (250, 500)),
            (128, 2, 2, 1, 4, 1, 6, 1, 1024, 1, (128,)),
            (256, 1, 2, 1, 1, 1, 3, 2, 512, 3, (300,)),
        ):
            kernel = Kernel("tile", affine, (*config, 0 if affine else k // 256 % 3))
            n = 64 * kernel.values["RT"] * kernel.values["WGS"] * blocks
            problem = Problem(n, k, "cpu", parts=(n // 2, n // 4, n // 4))
            fine &= all([check_one(kernel, problem, clusters, rows) for rows in rows_tried])
    return fine


def check_variants() -> bool:
    """Every variant that the experiment runs, on as few outputs as it takes."""
    fine = True
    for kernel in all_kernels():
        v = kernel.values
        if kernel.family == "few":
            n = 32 * v["RBLOCKS"]
            k = kernel.cluster * v["KWARPS"] * v["CHUNKS"] * 128
            fine &= check_one(kernel, Problem(n, k, "cpu", parts=(n - 16, 16)), 1, 8 * v["NT"] - 3)
        elif kernel.family == "tile":
            n = 64 * v["RT"] * v["WGS"] * v["SHARE"]
            problem = Problem(
                n, 128 * v["KS"] * v["SPLIT"] * (1 + v["STAGES"] // 2), "cpu", parts=(n - 64, 64)
            )
            fine &= check_one(kernel, problem, 1, v["TILE"] - 5)
    return fine


def check_whole() -> bool:
    fine = True
    for affine in (0, 1):
        library = build("w4_whole", {"AFFINE": affine})
        n, k = 96, 512
        problem = Problem(n, k, "cpu", parts=(48, 32, 16))
        operands = problem.affine if affine else problem.nf4
        parts = make_parts(problem)
        for first, blocks in ((0, 6), (2, 3)):
            w = torch.full((blocks * 16, k), float("nan"), dtype=torch.float16)
            library.run(
                2,
                *(pointer(t) for t in operands),
                pointer(problem.map),
                pointer(w),
                first,
                blocks,
                n,
                k,
                ctypes.byref(parts),
            )
            fine &= report(
                f"whole affine {affine}",
                w,
                problem.dense(affine)[first * 16 : (first + blocks) * 16].double(),
            )
    return fine


def main() -> None:
    wanted = sys.argv[1:] or ["few", "tile", "whole"]
    np.seterr(all="raise")
    torch.manual_seed(1)
    checks = {"few": check_few, "tile": check_tile, "whole": check_whole, "variants": check_variants}
    results = [checks[name]() for name in wanted]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
