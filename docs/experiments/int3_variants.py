"""Which variants of the W4 kernels serve int3's linears fastest: Llama-3.1-8B's four on an H100, float16.

python docs/experiments/int3_variants.py [--group 64] [--rows 1,8,16,32,64,256] [--list]

Every candidate is held against float64 once and timed in a CUDA graph over weights rotated past the L2, with dependent
launches, one linear behind itself. A line for each linear and number of rows: what the table takes, then the fastest.
`--list` needs no GPU.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from service.kernels.w4_linear import Row, Shape, Weight, load, plan
from service.kernels.w4_linear.plan import FewSettings, TileSettings, few_of, most_sums, tile_of
from service.kernels.w4_linear.variants import Variant, most_shared_bytes
from tests.kernels.w4_weights import random_int3

LINEARS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
FEW = [FewSettings(16, stages, 2, 1) for stages in (3, 4, 5, 6)]
FEW += [FewSettings(8, stages, 2, 2) for stages in (4, 6, 8)]
ROTATED_BYTES = 192 << 20
LARGEST_ERROR = 6e-4


def tiles(rows: int) -> list[TileSettings]:
    """As many stages as fit, for each way to share 64 outputs out."""
    found = []
    for rt, wgs, ks in ((1, 2, 2), (1, 3, 2), (1, 4, 2), (2, 2, 2), (1, 2, 1), (1, 3, 1), (2, 2, 1)):
        sums = rows * rt * (1 if rows > 16 else 3)  # registers
        if sums > (128 if wgs == 4 else 256) or (rows > 64 and ks == 2) or (rows <= 64 and ks == 1):
            continue
        for stretched in (0.0, 0.9):
            found.append(TileSettings(rows, rt, wgs, ks, 2, 0, int(rows <= 16), stretched))
    return found


def deepest(shape: Shape, tile: TileSettings) -> list[Variant]:
    """With the fewest stages that leave no room for a second block, with the most, and between."""
    made = []
    for stages in range(3, 17):
        try:
            variant = tile_of(shape, tile._replace(stages=stages))
        except AssertionError:  # too little for one block a multiprocessor, or too much
            continue
        if variant.sums_of_block <= most_sums():
            made.append(variant)
    return [*dict.fromkeys((made[0], made[len(made) // 2], made[-1]))] if made else []


def candidates(shape: Shape, rows: int) -> list[Variant]:
    found: list[Variant] = []
    if rows <= 8:
        each = [few_of(shape, few) for few in FEW]
        found += [
            few
            for few in each
            if few.max_rows(shape.in_features) >= rows
            and few.shared_bytes_for(rows, shape.in_features) <= most_shared_bytes(few.each)
        ]
    size = next(size for size in (8, 16, 32, 64, 128, 256) if rows <= size or size == 256)
    for tile in tiles(size):
        found += deepest(shape, tile)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--rows", default="1,8,16,32,64,256")
    parser.add_argument("--list", action="store_true")
    told = parser.parse_args()
    shapes = {name: Shape("int3", *linear, told.group, torch.float16) for name, linear in LINEARS.items()}
    all_rows = [int(rows) for rows in told.rows.split(",")]
    asked = {(name, rows): candidates(shape, rows) for name, shape in shapes.items() for rows in all_rows}
    variants = {variant for each in asked.values() for variant in each}
    variants |= {row.variant for shape in shapes.values() for row in plan(shape)}
    print(f"{len(variants)} variants")
    if told.list:
        for variant in sorted(variants, key=lambda each: each.name):
            print(variant.name)
        return
    with ThreadPoolExecutor() as pool:
        list(pool.map(load, variants))
    sums = dict.fromkeys(all_rows, 0.0), dict.fromkeys(all_rows, 0.0)
    for name, shape in shapes.items():
        source = random_int3(*LINEARS[name], "cuda", told.group)
        weight, dense = source.pack(shape.outs), source.dense()
        for rows in all_rows:
            x = torch.randn(rows, shape.in_features, device="cuda").half()
            want = x.double() @ dense.double().t()
            served = next(row.variant for row in plan(shape) if row.max_rows is None or rows <= row.max_rows)
            times = {
                variant: microseconds(weight, variant, x, want) for variant in {served, *asked[name, rows]}
            }
            best = sorted(times, key=lambda variant: times[variant])[:3]
            sums[0][rows] += times[served]
            sums[1][rows] += times[best[0]]
            told_best = "; ".join(f"{times[each]:.1f} {each.name}" for each in best)
            print(f"{name:8}{rows:5} table {times[served]:6.1f} {served.name} | {told_best}", flush=True)
    for rows in all_rows:
        print(f"layer {rows:5} rows: table {sums[0][rows]:6.1f} us, best of each {sums[1][rows]:6.1f}")


def microseconds(weight: Weight, variant: Variant, x: Tensor, want: Tensor) -> float:
    from service.kernels.w4_linear.cuda import Bound

    table = (Row(None, variant),)
    products: list[Callable[[Tensor], Tensor]] = [Bound(weight, table, x.dtype)]
    for _ in range(max(1, ROTATED_BYTES // weight.codes.nbytes)):
        products.append(Bound(replace(weight, codes=weight.codes.clone()), table, x.dtype))
    error = float((products[0](x).double() - want).norm() / want.norm())
    assert error < LARGEST_ERROR, (variant.name, error)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for multiply in products:
            multiply(x)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(products))
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
