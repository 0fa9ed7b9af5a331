"""Which kernel and variant serves a W4 linear behind how many rows: one table, and why a linear is not in it.

precision/awq, nf4 --Shape--> refusal, or plan --> cuda.py, engine/kernels_ahead

A plan is a row for each range of numbers of rows, whose end is included. It follows from shape and kind
alone: layers, self-check and compilation ahead of the first launch share it. Measured in
docs/experiments.md, section 6.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from service.kernels.w4_linear.layout import AFFINE_GROUP, BLOCK_ROWS, NF4_BLOCK, Kind
from service.kernels.w4_linear.variants import Few, Tile, Variant, most_shared_bytes

MAX_PARTS = 4  # of a merged layer, as w4_device.h has it
OUTPUTS = 32  # that the outputs are a multiple of: scales are fetched so
DTYPES = (torch.float16, torch.bfloat16)  # of activations


class FewSettings(NamedTuple):
    warps: int
    stages: int
    per_sm: int
    each: int


class TileSettings(NamedTuple):
    tile: int
    rt: int
    wgs: int
    ks: int
    stages: int
    per_sm: int
    scaled_sums: int
    whole_from: int


class Table(NamedTuple):
    few: tuple[FewSettings, ...]  # in turn, each for as many rows as it takes
    tiles: tuple[tuple[int | None, TileSettings], ...]  # by the most rows


FEW, TILE_OF_8 = FewSettings(16, 3, 2, 1), TileSettings(8, 1, 2, 2, 6, 2, 1, 90)
NARROW = Table(
    (FEW,),
    (
        (8, TILE_OF_8),
        (16, TileSettings(16, 1, 4, 2, 7, 1, 1, 90)),
        (32, TileSettings(32, 1, 4, 2, 6, 1, 0, 90)),
        (64, TileSettings(64, 1, 2, 2, 6, 1, 1, 90)),
        (256, TileSettings(128, 1, 3, 1, 6, 1, 0, 90)),
        (None, TileSettings(256, 1, 2, 1, 4, 1, 0, 70)),
    ),
)
# As many outputs as nearly fill the device with tall tiles: to leave some of it idle costs less than to cut.
MANY_ROWS = (
    (64, TileSettings(64, 2, 2, 2, 5, 1, 0, 80)),
    (128, TileSettings(128, 2, 2, 1, 7, 1, 0, 80)),
    (None, TileSettings(256, 1, 2, 1, 4, 1, 0, 70)),
)
WIDE: dict[Kind, Table] = {
    "affine": Table(
        (FEW,),
        (
            (8, TILE_OF_8),
            (16, TileSettings(16, 2, 2, 2, 7, 1, 0, 80)),
            (32, TileSettings(32, 2, 2, 2, 6, 1, 0, 80)),
            *MANY_ROWS,
        ),
    ),
    # with few rows decoding takes the time, for which every multiprocessor is wanted
    "nf4": Table(
        (FewSettings(8, 4, 2, 2), FEW),
        (
            (8, TILE_OF_8),
            (16, TileSettings(16, 1, 4, 2, 7, 1, 1, 90)),
            (32, TileSettings(32, 1, 4, 2, 6, 1, 0, 90)),
            *MANY_ROWS,
        ),
    ),
}
MOST_WIDE = 132 * 256  # outputs of tall tiles, one for each multiprocessor of the H100 that was measured
LEAST_WIDE = 0.8 * MOST_WIDE


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
    table, rows, served = table_of(shape), list[Row](), 0
    for few in table.few:
        variant = few_of(shape, few)
        most = variant.max_rows(shape.in_features)  # fewer where x is long: it lies in shared memory
        if most > served:
            rows.append(Row(most, variant))
            served = most
    for max_rows, tile in table.tiles:
        if max_rows is None or max_rows > served:
            rows.append(Row(max_rows, tile_of(shape, tile)))
    return tuple(rows)


def table_of(shape: Shape) -> Table:
    is_wide = LEAST_WIDE <= shape.out_features <= MOST_WIDE
    return WIDE[shape.kind] if is_wide else NARROW


def few_of(shape: Shape, few: FewSettings) -> Few:
    return Few(shape.kind, is_bf16(shape), few.stages, few.per_sm, few.each, few.warps)


def tile_of(shape: Shape, tile: TileSettings) -> Tile:
    rest = (tile.tile, tile.rt, tile.wgs, tile.ks, tile.scaled_sums, tile.whole_from)
    found = Tile(shape.kind, is_bf16(shape), tile.stages, tile.per_sm, 1, *rest)
    assert found.shared_bytes <= most_shared_bytes(1), found
    return found


def is_bf16(shape: Shape) -> int:
    return int(shape.dtype is torch.bfloat16)


def most_sums() -> int:
    """Float32 numbers that a block of any of the tables' variants leaves for others."""
    example = Shape("affine", (OUTPUTS,), AFFINE_GROUP, AFFINE_GROUP, torch.float16)
    tables = (NARROW, *WIDE.values())
    return max(tile_of(example, tile).sums_of_block for table in tables for _, tile in table.tiles)
