"""Runs w16_tile.cu on a CPU (tests/kernels/emulated.py) against float64 on small shapes. A minute.

python docs/experiments/w16_tile_emulate.py [faults]

`faults`: errors are put into the kernel on purpose, and each must be found.
"""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from w16_tile_variants import INPUTS, PIECE, SOURCE, Variant

from service.kernels.cuda import Program
from service.kernels.gated_silu import reference
from tests.kernels.emulated import box, build, pointer

RUN = """void run(int grid, uint32_t order, TensorMap* x, TensorMap* w, TensorMap* y, int rows, int n, int k) {
    emulated_order = order;
    emulate(grid, CLUSTER, THREADS, [=] { w16_tile(*x, *w, *y, rows, n, k); }); }
"""
ORDERS = (0, 11, 2026)  # seeds by which blocks are held up
Case = tuple[Variant, int, int, int, int]  # rows, rows of W, K, blocks
CASES: tuple[Case, ...] = (
    (Variant(1), 130, 2 * 136, 392, 3),  # a tile of which nearly nothing is there, two of them a block
    (Variant(0), 77, 520, 200, 1),  # all tiles one block's; fewer steps than stages
    (Variant(0, bf16=1), 200, 264, 328, 5),  # more blocks than tiles
    (Variant(1, 2), 200, 2 * 264, 456, 4),
    (Variant(1, 1, 2, bf16=1), 130, 2 * 392, 328, 4),
    (Variant(0, 2, 2), 250, 1032, 392, 4),  # two rounds of a cluster
    (Variant(1, 4, 1, 1), 300, 2 * 200, 392, 4),
    (Variant(1, 2, 2, 1, bf16=1), 333, 2 * 264, 456, 8),
    (Variant(0, 2, 1, 1), 300, 264, 64, 2),  # fewer steps than the skew wants
)
# what is planted -> the places that change; the case that is to find it
FAULTS: dict[str, tuple[Case, tuple[tuple[str, str], ...]]] = {
    "a stage is given back while the tensor cores read it": (
        CASES[0],
        (("wgmma_wait<1>();\n            if (step > 0) give_back();", "give_back();\n            wgmma_wait<1>();"),
         ("wgmma_wait<0>();\n        give_back();", "wgmma_wait<0>();")),
    ),
    "a block writes into the others' stages when its own are free": (
        CASES[5],
        (("WARPS * WRITERS", "WARPS"), ("lane < WRITERS", "lane == 0"), ("8 * done, told", "8 * done, rank")),
    ),
    "a piece of y is overwritten before it has left": (CASES[5], (("if (lane == 0) stores_wait_read<1>();", ""),)),
    "the block ends before y is written": (CASES[3], (("if (lane == 0) stores_wait<0>();", ""),)),
    "x is fetched before its maker is over": (CASES[3], (("            await_predecessor();\n            for", "for"),)),
}  # fmt: skip


def compute(
    variant: Variant, source: Path, x: Tensor, w: Tensor, blocks: int, orders: tuple[int, ...]
) -> list[Tensor]:
    """y by each order, with a row more than it should touch."""
    folder = Path(tempfile.mkdtemp(prefix="w16_tile_"))
    library = build(Program(source, "w16_tile", tuple(variant.definitions.items())), folder, RUN)
    shutil.rmtree(folder)
    (rows, k), n = x.shape, w.shape[0]
    columns = n // 2 if variant.gated else n
    of_x, of_w = (
        box(x, (rows, k), variant.x_box, INPUTS, swizzled=1),
        box(w, (n, k), variant.w_box, INPUTS, swizzled=2),
    )
    found = []
    for order in orders:
        y = torch.full((rows + 1, columns), float("nan"), dtype=x.dtype)
        of_y = box(y, (rows, columns), *PIECE, swizzled=1)
        library.run(blocks, order, *map(pointer, (of_x, of_w, of_y)), rows, n, k)
        found.append(y)
    return found


def check(case: Case, source: Path = SOURCE) -> bool:
    """Right within rounding, nothing beyond the last row, the same bits in whatever order blocks come."""
    variant, rows, n, k, blocks = case
    torch.manual_seed(1)
    dtype = torch.bfloat16 if variant.bf16 else torch.float16
    x, w = torch.randn(rows, k).to(dtype), (torch.randn(n, k) * 2 / k**0.5).to(dtype)
    found = compute(variant, source, x, w, blocks, ORDERS)
    want = x.double() @ w.double().t()
    if variant.gated:
        gate, up = want.chunk(2, -1)
        want = F.silu(gate) * up
    error = float((found[0][:rows].double() - want).norm() / want.norm())
    untouched = all(bool(y[rows].isnan().all()) for y in found)
    same = all(torch.equal(y[:rows], found[0][:rows]) for y in found)
    fine = error < (5e-3 if variant.bf16 else 6e-4) and untouched and same
    told = "" if untouched and same else f" untouched {untouched}, same bits {same}"
    if variant.gated and source == SOURCE:
        other = compute(Variant(0, bf16=variant.bf16), source, x, w, 2, (0,))[0][:rows]
        apart = float((reference.gated_silu(other) != found[0][:rows]).float().mean())
        fine, told = fine and apart < 2e-3, told + f", {apart:.1e} of them not gated_silu's bits"
    print(
        f"{'ok  ' if fine else 'BAD '} {error:.1e}  {variant.label} M={rows} N={n} K={k} on {blocks}{told}",
        flush=True,
    )
    return fine


def find_faults() -> bool:
    """Whether each is found; one that is found at once ends its process, and that is told."""
    found_all, text = True, SOURCE.read_text()
    for name, (case, places) in FAULTS.items():
        folder = Path(tempfile.mkdtemp(prefix="w16_fault_"))
        shutil.copy(SOURCE.parent / "w16_device.h", folder)
        changed = text
        for old, new in places:
            assert old in changed, old
            changed = changed.replace(old, new)
        (folder / SOURCE.name).write_text(changed)
        found = not in_child(case, folder / SOURCE.name)
        print(f"{'found' if found else 'NOT FOUND'}: {name}", flush=True)
        found_all &= found
        shutil.rmtree(folder)
    return found_all


def in_child(case: Case, source: Path) -> bool:
    """The emulator aborts where it sees a fault itself."""
    import os

    child = os.fork()
    if child == 0:
        os._exit(0 if check(case, source) else 1)
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    sys.exit(0 if (find_faults() if "faults" in sys.argv else all([check(case) for case in CASES])) else 1)


if __name__ == "__main__":
    main()
