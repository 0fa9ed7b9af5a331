"""The very CUDA kernels that a GPU runs, compiled with g++ for a machine made of fibers (w4_emulator.h).

It shows numbers, barriers, buffers given back too early and addresses that a GPU would refuse; not what a
compiler for the GPU makes of them, nor speed.
"""

import ctypes
import shutil
import subprocess
from ctypes import c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.kernels.w4_linear import Kind, Weight
from service.kernels.w4_linear.cuda import parts_of
from service.kernels.w4_linear.variants import FOLDER, Few, Tile, Variant
from tests.kernels.w4_weights import random_weight

FLAGS = ["-std=c++17", "-O1", "-mavx2", "-mf16c", "-mfma", "-shared", "-fPIC", "-w", "-Wno-psabi"]
SIGNATURES = {
    "w4_few": (
        "const char* codes, const char* scales, const char* zeros, const float* nested, const float* map,"
        " const char* x, char* y, int rows, int n, Parts* parts",
        "codes, scales, zeros, nested, map, x, y, rows, n, *parts",
    ),
    "w4_tile": (
        "TensorMap* x, TensorMap* codes, const char* scales, const char* zeros, const float* nested,"
        " const float* map, char* y, int rows, int n, int k, Parts* parts",
        "*x, *codes, scales, zeros, nested, map, y, rows, n, k, *parts",
    ),
}
# (variant, outputs, input features, rows): ragged ends, shares of the input features, several rounds
CASES: list[tuple[Variant, tuple[int, ...], int, int]] = [
    (Few("nf4", 1, 4, 1, 2, 1, 3), (48, 16, 16), 1024, 7),
    (Few("affine", 2, 2, 1, 2, 2, 4), (64, 32), 1024, 9),
    (Tile("nf4", 64, 1, 2, 2, 2, 1, 3), (64, 64), 512, 50),
    (Tile("affine", 32, 2, 2, 2, 1, 1, 3), (128, 128), 384, 37),
]


def emulated(variant: Variant, folder: Path) -> ctypes.CDLL:
    """A library whose `run` is a launch."""
    parameters, arguments = SIGNATURES[variant.kernel]
    source, library = folder / "driver.cpp", folder / "kernel.so"
    cluster, threads = variant.blocks_of_cluster, variant.threads
    source.write_text(
        f'#include "{variant.kernel}.cu"\nextern "C" void run(int grid, {parameters}) {{'
        f" emulate(grid, {cluster}, {threads}, [=] {{ {variant.kernel}({arguments}); }}); }}\n"
    )
    settings = [option for option in variant.program.options if option.startswith("-D")]
    folders = [f"-I{FOLDER}", f"-I{Path(__file__).parent}"]
    command = ["g++", *FLAGS, *settings, *folders, "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def pointer(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def box(tensor: Tensor, shape: tuple[int, int], rows: int, columns: int, *, swizzled: bool) -> Tensor:
    """A tensor map of the emulator's, of a [rows, columns] matrix."""
    size = tensor.element_size()
    fields = [tensor.data_ptr(), shape[1], shape[0], shape[1] * size, size, columns, rows, int(swizzled)]
    return torch.tensor([*fields, *[0] * 8])


def launch(library: ctypes.CDLL, variant: Variant, weight: Weight, x: Tensor, y: Tensor) -> None:
    nested = weight.nested
    rest = [weight.scales, weight.zeros, nested and nested.absmax, nested and nested.map]
    num_rows, n, k = x.shape[0], weight.out_features, weight.in_features
    grid = variant.clusters(num_rows, n, 2) * variant.blocks_of_cluster
    parts = ctypes.byref(parts_of(weight))
    if isinstance(variant, Tile):
        words = weight.codes.view(torch.int32)
        maps = (
            box(x, (num_rows, k), variant.tile // variant.share, 64, swizzled=True),
            box(words, (n // 16, k * 2), variant.outputs // 16, 128 * variant.ks, swizzled=False),
        )
        library.run(grid, *map(pointer, (*maps, *rest, y)), num_rows, n, k, parts)
    else:
        library.run(grid, *map(pointer, (weight.codes, *rest, x, y)), num_rows, n, parts)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the kernels for the emulator")
@pytest.mark.parametrize(
    ("variant", "outs", "in_features", "num_rows"), CASES, ids=[f"{c[0].name}-{c[0].kind}" for c in CASES]
)
def test_kernels_compute_what_their_weights_mean(
    tmp_path: Path, variant: Variant, outs: tuple[int, ...], in_features: int, num_rows: int
) -> None:
    torch.manual_seed(0)
    assert variant.serves(sum(outs), in_features)
    kind: Kind = variant.kind
    source = random_weight(kind, outs, in_features)
    x = torch.randn(num_rows, in_features).half()
    y = torch.full((num_rows + 1, sum(outs)), float("nan"), dtype=torch.float16)
    launch(emulated(variant, tmp_path), variant, source.pack(outs), x, y[:num_rows])
    assert torch.isnan(y[num_rows]).all()
    want = x.double() @ source.dense().double().t()
    assert (y[:num_rows].double() - want).norm() < 6e-4 * want.norm()
