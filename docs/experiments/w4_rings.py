"""How deep a ring, shared out how: which variants of the W4 kernels serve Llama-3.1-8B's linears fastest on an H100, float16.

python docs/experiments/w4_rings.py [--codes "affine 128,nf4 64,int3 64"] [--rows 1,8,16,32,64] [--list]

Every candidate is held against float64 once and timed in a CUDA graph over weights rotated past the L2, with dependent
launches, one linear behind itself. A line for each linear and number of rows: what the table takes, then the fastest.
At last layers, qkv, o, gate_up, down in turn in one graph: by the table, and by the fastest of each. `--list` needs no GPU.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from graph_times import capture, replays_us
from torch import Tensor

from service.kernels.w4_linear import Row, Shape, Weight, load, plan
from service.kernels.w4_linear.plan import FewSettings, TileSettings, few_of, most_sums, tile_of
from service.kernels.w4_linear.variants import Variant, most_shared_bytes
from tests.kernels.w4_weights import KINDS, Codes, random_weight

LINEARS = {
    "qkv": ((4096, 1024, 1024), 4096),
    "o": ((4096,), 4096),
    "gate_up": ((14336, 14336), 4096),
    "down": ((4096,), 14336),
}
SIZES = (8, 16, 32, 64, 128, 256)
SHARED_OUT = ((1, 2, 2), (1, 3, 2), (1, 4, 2), (2, 2, 2), (1, 2, 1), (1, 3, 1), (2, 2, 1))  # rt, wgs, ks
FEW = [(16, stages, 2, 1) for stages in (2, 3, 4, 5, 6)] + [(8, stages, 2, 2) for stages in (3, 4, 6, 8)]
WIDE_TABLE_ROWS = 128  # to which NF4's tiles have it
RINGS = 5  # of a tile, from the least number of stages on
LAYERS = 3
ROTATED_BYTES = 192 << 20
LARGEST_ERROR = 6e-4
Product = Callable[[Tensor], Tensor]


def tiles(codes: Codes, rows: int) -> list[TileSettings]:
    """For each way to share 64 outputs out."""
    found = []
    has_wide_table = int(codes.kind == "nf4" and rows <= WIDE_TABLE_ROWS)
    for rt, wgs, ks in SHARED_OUT:
        sums = rows * rt * (1 if rows > 16 else 3)  # registers
        if sums > (128 if wgs == 4 else 256) or (rows > 64 and ks == 2) or (rows <= 64 and ks == 1):
            continue
        for stretched in (0.0, 0.9):
            found.append(TileSettings(rows, rt, wgs, ks, 2, has_wide_table, int(rows <= 16), stretched))
    return found


def rings(shape: Shape, tile: TileSettings) -> list[Variant]:
    """From the fewest stages that leave no room for a second block on."""
    made = []
    for stages in range(2, 17):
        try:
            variant = tile_of(shape, tile._replace(stages=stages))
        except AssertionError:  # too little for one block a multiprocessor, or too much
            continue
        if variant.sums_of_block <= most_sums():
            made.append(variant)
    return made[:RINGS]


def candidates(codes: Codes, shape: Shape, rows: int) -> list[Variant]:
    found: list[Variant] = []
    if rows <= SIZES[0]:
        wide = (0, 1) if codes.kind == "nf4" else (0,)
        each = [few_of(shape, FewSettings(*few, wide_table=table)) for few, table in product(FEW, wide)]
        found += [few for few in each if few.max_rows(shape.in_features) >= rows and fits(few, rows, shape)]
    size = next(size for size in SIZES if rows <= size or size == SIZES[-1])
    for tile in tiles(codes, size):
        found += rings(shape, tile)
    return found


def fits(variant: Variant, rows: int, shape: Shape) -> bool:
    return variant.shared_bytes_for(rows, shape.in_features) <= most_shared_bytes(variant.each)


def served(shape: Shape, rows: int) -> Variant:
    return next(row.variant for row in plan(shape) if row.max_rows is None or rows <= row.max_rows)


def bound(weight: Weight, variant: Variant) -> Product:
    from service.kernels.w4_linear.cuda import Bound

    return Bound(weight, (Row(None, variant),), torch.float16)


def graph_us(launches: Sequence[Callable[[], Tensor]]) -> float:
    """Median microseconds of all of them, captured one behind the other."""
    return statistics.median(replays_us(capture(launches)))


def alone_us(weight: Weight, variant: Variant, x: Tensor, want: Tensor) -> float:
    """Of a product behind others of its own, each with other weights."""
    copies = max(2, ROTATED_BYTES // weight.codes.nbytes + 1)
    weights = [weight, *(replace(weight, codes=weight.codes.clone()) for _ in range(copies - 1))]
    products = [bound(each, variant) for each in weights]
    error = float((products[0](x).double() - want).norm() / want.norm())
    assert error < LARGEST_ERROR, (variant.name, error)
    return graph_us([lambda multiply=multiply: multiply(x) for multiply in products]) / copies


def layer_us(codes: Codes, variants: dict[str, Variant], rows: int) -> float:
    launches = []
    for _ in range(LAYERS):
        for name, variant in variants.items():
            outs, in_features = LINEARS[name]
            source = random_weight(codes.kind, outs, in_features, "cuda", codes.group_size)
            multiply = bound(source.pack(outs), variant)
            x = torch.randn(rows, in_features, device="cuda").half()
            launches.append(lambda multiply=multiply, x=x: multiply(x))
    return graph_us(launches) / LAYERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--codes", default=",".join(map(str, KINDS)))
    parser.add_argument("--rows", default="1,8,16,32,64")
    parser.add_argument("--list", action="store_true")
    told = parser.parse_args()
    all_rows = [int(rows) for rows in told.rows.split(",")]
    by_name = {str(codes): codes for codes in KINDS}
    for codes in (by_name[name.strip()] for name in told.codes.split(",")):
        shapes = {
            name: Shape(codes.kind, *linear, codes.group_size, torch.float16)
            for name, linear in LINEARS.items()
        }
        asked = {
            (name, rows): [*dict.fromkeys((served(shape, rows), *candidates(codes, shape, rows)))]
            for (name, shape), rows in product(shapes.items(), all_rows)
        }
        variants = {variant for each in asked.values() for variant in each}
        print(f"{codes}: {len(variants)} variants", flush=True)
        if told.list:
            print("\n".join(sorted(variant.name for variant in variants)))
            continue
        with ThreadPoolExecutor() as pool:
            list(pool.map(load, variants))
        fastest: dict[int, dict[str, Variant]] = {rows: {} for rows in all_rows}
        for name, shape in shapes.items():
            source = random_weight(codes.kind, *LINEARS[name], "cuda", codes.group_size)
            weight, dense = source.pack(shape.outs), source.dense().double()
            for rows in all_rows:
                x = torch.randn(rows, shape.in_features, device="cuda").half()
                want = x.double() @ dense.t()
                times = {variant: alone_us(weight, variant, x, want) for variant in asked[name, rows]}
                now, best = asked[name, rows][0], sorted(times, key=lambda variant: times[variant])
                fastest[rows][name] = best[0]
                told_best = "; ".join(f"{times[each]:.1f} {each.name}" for each in best[:4])
                print(
                    f"{codes} {name:8}{rows:5} table {times[now]:6.1f} {now.name} | {told_best}", flush=True
                )
            del weight, dense
        for rows in all_rows:
            table = {name: served(shape, rows) for name, shape in shapes.items()}
            by_table, by_best = (layer_us(codes, each, rows) for each in (table, fastest[rows]))
            print(
                f"{codes} layer in one graph {rows:5} rows: table {by_table:.1f}, fastest of each {by_best:.1f} us"
            )


if __name__ == "__main__":
    main()
