"""Which kernel and variant serves a W4 linear behind how many rows: one table, and why a linear is not in it.

precision/awq, nf4 --Shape--> refusal, or plan --> cuda.py, engine/kernels_ahead

A plan is a row for each range of numbers of rows, whose end is included. It follows from shape and kind
alone: layers, self-check and compilation ahead of the first launch share it. Measured in
docs/experiments.md, section 6.
"""

from dataclasses import dataclass

import torch

from service.kernels.w4_linear.layout import AFFINE_GROUP, BLOCK_ROWS, NF4_BLOCK, Kind
from service.kernels.w4_linear.variants import Few, Tile, Variant, most_shared_bytes

MAX_PARTS = 4  # of a merged layer, as w4_device.h has it
OUTPUTS = 32  # that the outputs are a multiple of: scales are fetched so
DTYPES = (torch.float16, torch.bfloat16)  # of activations
# w4_few: warps, stages, blocks that registers leave room for, blocks of a launch on a multiprocessor
FEW = (16, 3, 2, 1)
# w4_tile by the most rows: tile, rt, wgs, ks, stages, blocks of registers, scaled sums, blocks of a launch
TILES: tuple[tuple[int | None, tuple[int, ...]], ...] = (
    (8, (8, 1, 4, 2, 8, 1, 1, 1)),
    (16, (16, 1, 4, 2, 7, 1, 1, 1)),
    (32, (32, 1, 4, 2, 6, 1, 1, 1)),
    (64, (64, 1, 4, 2, 5, 1, 0, 1)),
    (128, (128, 2, 2, 1, 7, 1, 0, 1)),
    (None, (256, 1, 2, 1, 4, 1, 0, 1)),
)


@dataclass(frozen=True)
class Shape:
    """What decides whether and how a linear is served."""

    kind: Kind
    outs: tuple[int, ...]  # outputs of each part
    in_features: int
    group_size: int  # weights under one scale, or under one absmax
    dtype: torch.dtype  # of activations
    is_nested: bool = True  # NF4's absmax are 8-bit codes themselves

    @property
    def out_features(self) -> int:
        return sum(self.outs)


@dataclass(frozen=True)
class Row:
    """Of a plan."""

    max_rows: int | None  # None: any number
    variant: Variant


def refusal(shape: Shape) -> str:
    """Why these kernels do not serve it; empty where they do."""
    group_size = AFFINE_GROUP if shape.kind == "affine" else NF4_BLOCK
    if shape.dtype not in DTYPES:
        return f"activations are {shape.dtype}, they compute with 16-bit types"
    if shape.group_size != group_size:
        return f"groups are of {shape.group_size} weights, they read {group_size}"
    if not shape.is_nested:
        return "absmax values are float32, they read the 8-bit codes of double quantization"
    if len(shape.outs) > MAX_PARTS:
        return f"{len(shape.outs)} linears share an input, they take {MAX_PARTS}"
    if any(out % BLOCK_ROWS for out in shape.outs) or shape.out_features % OUTPUTS:
        return f"outputs {list(shape.outs)} are no multiple of {BLOCK_ROWS} each and of {OUTPUTS} together"
    if shape.in_features % AFFINE_GROUP:
        return f"{shape.in_features} input features are no multiple of {AFFINE_GROUP}"
    return ""


def plan(shape: Shape) -> tuple[Row, ...]:
    """For a shape that is not refused."""
    assert not refusal(shape), shape
    few = few_of(shape)
    rows = [Row(few.max_rows(shape.in_features), few)]
    rows += [Row(max_rows, tile_of(shape, settings)) for max_rows, settings in TILES]
    # where x is long, fewer of its rows fit into shared memory beside the weights' rings
    served = [row for row in rows if row.max_rows != 0]
    first = served[0].max_rows
    return (served[0], *(row for row in served[1:] if row.max_rows is None or row.max_rows > (first or 0)))


def few_of(shape: Shape) -> Few:
    warps, stages, per_sm, each = FEW
    return Few(shape.kind, is_bf16(shape), stages, per_sm, each, warps)


def tile_of(shape: Shape, settings: tuple[int, ...]) -> Tile:
    tile, rt, wgs, ks, stages, per_sm, scaled_sums, each = settings
    common = (shape.kind, is_bf16(shape), stages, per_sm, each)
    found = Tile(*common, tile, rt, wgs, ks, 0, scaled_sums)
    assert found.shared_bytes <= most_shared_bytes(each), found
    return found


def is_bf16(shape: Shape) -> int:
    return int(shape.dtype is torch.bfloat16)


def most_sums() -> int:
    """Float32 numbers that a block of any of the table's variants leaves for others."""
    example = Shape("affine", (OUTPUTS,), AFFINE_GROUP, AFFINE_GROUP, torch.float16)
    tiles = [tile_of(example, settings) for _, settings in TILES]
    return max(tile.each * tile.sums_of_block for tile in tiles)
