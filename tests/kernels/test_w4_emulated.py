"""The very CUDA kernels that a GPU runs, compiled with g++ for a machine made of fibers (machine_emulator.h).

It shows numbers, barriers, buffers given back too early and addresses that a GPU would refuse; not what a
compiler for the GPU makes of them, nor speed.
"""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.kernels.w4_linear import Kind, Weight
from service.kernels.w4_linear.cuda import parts_of
from service.kernels.w4_linear.variants import Few, Tile, Variant
from tests.kernels.emulated import box, build, pointer
from tests.kernels.w4_weights import random_weight

SIGNATURES = {
    "w4_few": (
        "const char* codes, const char* scales, const char* zeros, const float* nested, const float* map,"
        " const char* x, char* y, int rows, int n, int width, int k, Parts* parts",
        "codes, scales, zeros, nested, map, x, y, rows, n, width, k, *parts",
    ),
    "w4_tile": (
        "TensorMap* x, TensorMap* codes, const char* scales, const char* zeros, const float* nested,"
        " const float* map, char* y, float* sums, uint32_t* flags, int rows, int n, int width, int k,"
        " Parts* parts",
        "*x, *codes, scales, zeros, nested, map, y, sums, flags, rows, n, width, k, *parts",
    ),
}
# (variant, outputs, input features, rows, blocks): ragged ends, tiles cut over blocks, several rounds
CASES: list[tuple[Variant, tuple[int, ...], int, int, int]] = [
    (Few("nf4", 64, 0, 3, 2, 1, 8, 1, 1), (48, 16, 32), 1152, 7, 2),  # warps with one chunk and with two
    (Few("affine", 128, 1, 4, 1, 1, 16, 2, 0), (64, 32), 640, 13, 5),  # more warps than chunks
    (Few("int3", 64, 0, 5, 2, 1, 8, 1, 0), (48, 16, 32), 1152, 7, 2),
    (Few("int3", 128, 1, 3, 2, 1, 8, 1, 0), (32, 64), 1152, 3, 3),
    # two tiles, two shares each
    (Tile("nf4", 64, 0, 3, 1, 1, 64, 1, 2, 2, 0, 0, 1), (144, 16, 32), 512, 50, 5),
    (Tile("int3", 128, 0, 3, 1, 1, 16, 1, 2, 2, 0, 1, 0), (144, 16, 32), 512, 13, 5),
    # a whole tile and cut ones
    (Tile("affine", 128, 1, 3, 2, 1, 8, 1, 2, 2, 1, 1, 0), (128, 256, 160), 384, 7, 3),
    (Tile("int3", 64, 1, 3, 2, 1, 8, 1, 2, 2, 1, 0, 0), (128, 256, 160), 384, 7, 3),
    (Tile("int3", 64, 0, 3, 2, 1, 8, 1, 2, 1, 0, 0, 0), (128, 32), 256, 9, 2),  # a group a stage
    (Few("affine", 64, 0, 3, 2, 1, 8, 1, 0), (48, 16, 32), 1152, 7, 2),
    (Tile("affine", 64, 0, 3, 1, 1, 8, 1, 2, 2, 1, 1, 0), (144, 16), 384, 7, 3),
    # four tiles, ragged, one whole
    (Tile("affine", 128, 0, 2, 1, 1, 192, 1, 2, 1, 1, 0, 0), (144, 16), 256, 200, 3),
]


def emulated(variant: Variant, folder: Path) -> ctypes.CDLL:
    """A library whose `run` is a launch."""
    parameters, arguments = SIGNATURES[variant.kernel]
    at_once = "grid" if isinstance(variant, Tile) else "1"  # blocks that wait for each other
    launch = f"emulate(grid, {at_once}, {variant.threads}, [=] {{ {variant.kernel}({arguments}); }});"
    run = f"void run(int order, int grid, {parameters}) {{ emulated_order = order; {launch} }}"
    return build(variant.program, folder, run)


class Machine:
    """One variant's kernel with `num_blocks` blocks, and what its launches leave for the next."""

    def __init__(self, variant: Variant, num_blocks: int, folder: Path) -> None:
        self.variant, self.num_blocks = variant, num_blocks
        self.library = emulated(variant, folder)
        self.flags = torch.zeros(num_blocks, dtype=torch.int32)

    def launch(self, weight: Weight, x: Tensor, y: Tensor, order: int) -> None:
        """`order`: of blocks, which a seed but 0 holds up."""
        variant, nested = self.variant, weight.nested
        rest = [weight.scales, weight.zeros, nested and nested.absmax, nested and nested.map]
        num_rows, n, k = x.shape[0], weight.out_features, weight.in_features
        told: tuple[Tensor | None, ...] = (weight.codes, *rest, x, y)
        if isinstance(variant, Tile):
            words, box_rows = weight.codes.flatten(2).view(torch.int32), variant.outputs // 16
            tile_words = words.shape[2]
            maps = (
                box(x, (num_rows, k), variant.tile, 64, swizzled=1),
                box(words, (n // 16, k // 64 * tile_words), box_rows, tile_words * variant.ks, swizzled=0),
            )
            sums = torch.full((self.num_blocks, variant.sums_of_block), float("nan"))
            told = (*maps, *rest, y, sums, self.flags)
        parts = ctypes.byref(parts_of(weight))
        self.library.run(order, self.num_blocks, *map(pointer, told), num_rows, n, n, k, parts)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, which compiles the kernels for the emulator")
@pytest.mark.parametrize(
    ("variant", "outs", "in_features", "num_rows", "num_blocks"),
    CASES,
    ids=[case[0].name for case in CASES],
)
def test_kernels_compute_what_their_weights_mean(
    tmp_path: Path,
    variant: Variant,
    outs: tuple[int, ...],
    in_features: int,
    num_rows: int,
    num_blocks: int,
) -> None:
    """In whatever order blocks come: each time the same bits."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if variant.bf16 else torch.float16
    kind: Kind = variant.kind
    source = random_weight(kind, outs, in_features, group_size=variant.group)
    weight, machine = source.pack(outs), Machine(variant, num_blocks, tmp_path)
    x = torch.randn(num_rows, in_features).to(dtype)
    want = x.double() @ source.dense().double().t()
    first: Tensor | None = None
    for order in (0, 5):
        y = torch.full((num_rows + 1, sum(outs)), float("nan"), dtype=dtype)
        machine.launch(weight, x, y[:num_rows], order)
        assert torch.isnan(y[num_rows]).all()
        assert (y[:num_rows].double() - want).norm() < (4e-3 if variant.bf16 else 6e-4) * want.norm()
        first = y if first is None else first
        assert torch.equal(y[:num_rows], first[:num_rows])
