"""Which kernel and variant serves a W4 linear behind how many rows: one table, and why a linear is not in it.

precision/awq, nf4, int3 --Shape--> refusal, or plan --> cuda.py, engine/kernels_ahead

A plan is a row for each range of numbers of rows, whose end is included. It follows from shape and kind
alone: layers, self-check and compilation ahead of the first launch share it. Measured in
docs/experiments.md, sections 6 and 14.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from service.kernels.w4_linear.layout import BLOCK_ROWS, NF4_BLOCK, Kind
from service.kernels.w4_linear.variants import Few, Tile, Variant, most_shared_bytes

GROUPS: dict[Kind, tuple[int, ...]] = {"affine": (128, 64), "nf4": (NF4_BLOCK,), "int3": (64, 128)}
UNIT_K = 128  # input features in which work is dealt
MAX_PARTS = 4  # of a merged layer, as w4_device.h has it
MOST_SHARES = 8  # of a tile, as w4_tile.cu has it
OUTPUTS = 32  # that the outputs are a multiple of: scales are fetched so
DTYPES = (torch.float16, torch.bfloat16)  # of activations
MULTIPROCESSORS = 132  # of the H100 that was measured
WIDE = 16384  # outputs whose whole tiles keep most multiprocessors busy
ROWS = 1024  # for which the last row of a table is chosen, and any number served
ANOTHER_ROUND = 0.99  # what a round of whole tiles is worth beside one of the same sum


class FewSettings(NamedTuple):
    warps: int
    stages: int
    per_sm: int
    each: int
    tiles: int = 1
    wide_table: int = 0
    most_rows: int = 8


class TileSettings(NamedTuple):
    tile: int
    rt: int
    wgs: int
    ks: int
    stages: int
    wide_table: int = 0
    scaled_sums: int = 0
    stretched: float = 0.0  # if tiles are laid end to end: how busy others must keep the device to be as good
    least_outputs: int = 0  # of a linear
    rate: float = 1.0  # of its products, beside other tiles in the same row of a table


class Table(NamedTuple):
    few: tuple[FewSettings, ...]  # in turn, each for as many rows as it takes
    few_of_wide: tuple[FewSettings, ...]  # likewise, of linears with WIDE outputs or more
    tiles: tuple[tuple[int | None, tuple[TileSettings, ...]], ...]  # by the most rows; `worth` says which


# No tile leaves room for a second block on a multiprocessor, of which the first to be free would get two.
MANY_ROWS = (TileSettings(256, 1, 2, 1, 4), TileSettings(256, 1, 2, 1, 4, stretched=0.9))
TALL, FLAT = TileSettings(192, 1, 2, 1, 5, rate=0.886), TileSettings(128, 2, 2, 1, 7, rate=0.88)
# Here the last tiles of rows may be half empty, and a round of tiles half of the device.
BETWEEN = tuple(
    tile._replace(stretched=stretched) for tile in (MANY_ROWS[0], TALL, FLAT) for stretched in (0.0, 0.86)
)
MANY = (
    (256, MANY_ROWS),
    *((most, BETWEEN) for most in (384, 512, 576, 640, 768, 896)),
    (None, MANY_ROWS),
)
# fmt: off
TABLES: dict[Kind, Table] = {
    "affine": Table((FewSettings(16, 3, 2, 1),), (FewSettings(16, 3, 2, 1, most_rows=4),), (
        (8, (TileSettings(8, 2, 2, 2, 8, scaled_sums=1, least_outputs=WIDE),
             TileSettings(8, 1, 4, 2, 8, scaled_sums=1),
             TileSettings(8, 1, 4, 2, 8, scaled_sums=1, stretched=0.8))),
        (16, (TileSettings(16, 2, 2, 2, 7, scaled_sums=1, least_outputs=WIDE),
              TileSettings(16, 1, 4, 2, 5, scaled_sums=1),
              TileSettings(16, 1, 3, 2, 7, scaled_sums=1),
              TileSettings(16, 1, 2, 2, 10, scaled_sums=1),
              TileSettings(16, 2, 2, 2, 7, scaled_sums=1, stretched=0.8))),
        (32, (TileSettings(32, 1, 2, 2, 8),
              TileSettings(32, 1, 3, 2, 7),
              TileSettings(32, 2, 2, 2, 6),
              TileSettings(32, 2, 2, 2, 6, stretched=0.8))),
        (64, (TileSettings(64, 1, 2, 2, 6),
              TileSettings(64, 1, 3, 2, 6),
              TileSettings(64, 2, 2, 2, 5),
              TileSettings(64, 2, 2, 2, 5, stretched=0.8))),
        (128, (TileSettings(128, 1, 2, 1, 7),
               TileSettings(128, 1, 3, 1, 6),
               TileSettings(128, 2, 2, 1, 7),
               TileSettings(128, 2, 2, 1, 7, stretched=0.8))),
        *MANY,
    )),
    "nf4": Table((FewSettings(16, 3, 2, 1),), (), (
        (8, (TileSettings(8, 1, 4, 2, 5, wide_table=1, scaled_sums=1),
             TileSettings(8, 1, 4, 2, 8, wide_table=1, scaled_sums=1, stretched=0.84))),
        (16, (TileSettings(16, 2, 2, 2, 4, wide_table=1, scaled_sums=1),
              TileSettings(16, 1, 3, 2, 4, wide_table=1, scaled_sums=1),
              TileSettings(16, 1, 4, 2, 7, wide_table=1, scaled_sums=1, stretched=0.84))),
        (32, (TileSettings(32, 1, 3, 2, 6, wide_table=1),
              TileSettings(32, 1, 4, 2, 6, wide_table=1, stretched=0.85))),
        (64, (TileSettings(64, 1, 3, 2, 5, wide_table=1),
              TileSettings(64, 1, 4, 2, 4, wide_table=1, stretched=0.85))),
        (128, (TileSettings(128, 1, 2, 1, 7, wide_table=1),
               TileSettings(128, 1, 3, 1, 6, wide_table=1),
               TileSettings(128, 2, 2, 1, 6, wide_table=1),
               TileSettings(128, 2, 2, 1, 6, wide_table=1, stretched=0.8))),
        *MANY,
    )),
    "int3": Table((
        FewSettings(16, 3, 2, 1, most_rows=1),
        FewSettings(16, 5, 2, 1),
    ), (
        FewSettings(8, 4, 2, 2, most_rows=1),
        FewSettings(16, 5, 2, 1, most_rows=4),
    ), (
        (8, (TileSettings(8, 2, 2, 2, 11, scaled_sums=1, least_outputs=WIDE),
             TileSettings(8, 1, 4, 2, 11, scaled_sums=1),
             TileSettings(8, 1, 4, 2, 11, scaled_sums=1, stretched=0.8))),
        (16, (TileSettings(16, 2, 2, 2, 7, scaled_sums=1, least_outputs=WIDE),
              TileSettings(16, 1, 4, 2, 7, scaled_sums=1),
              TileSettings(16, 2, 2, 2, 7, scaled_sums=1, stretched=0.8))),
        (32, (TileSettings(32, 1, 2, 2, 12),
              TileSettings(32, 1, 3, 2, 9),
              TileSettings(32, 2, 2, 2, 8),
              TileSettings(32, 2, 2, 2, 8, stretched=0.8))),
        (64, (TileSettings(64, 1, 2, 2, 8),
              TileSettings(64, 1, 3, 2, 6),
              TileSettings(64, 2, 2, 2, 6),
              TileSettings(64, 2, 2, 2, 6, stretched=0.8))),
        (128, (TileSettings(128, 1, 2, 1, 8),
               TileSettings(128, 1, 3, 1, 8),
               TileSettings(128, 2, 2, 1, 7),
               TileSettings(128, 2, 2, 1, 7, stretched=0.8))),
        *MANY,
    )),
}
# fmt: on


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
    if shape.dtype not in DTYPES:
        return f"activations are {shape.dtype}, they compute with 16-bit types"
    if shape.group_size not in GROUPS[shape.kind]:
        read = " or ".join(map(str, GROUPS[shape.kind]))
        return f"groups are of {shape.group_size} weights, they read {read}"
    if not shape.is_nested:
        return "absmax values are float32, they read the 8-bit codes of double quantization"
    if len(shape.outs) > MAX_PARTS:
        return f"{len(shape.outs)} linears share an input, they take {MAX_PARTS}"
    if any(out % BLOCK_ROWS for out in shape.outs) or shape.out_features % OUTPUTS:
        return f"outputs {list(shape.outs)} are no multiple of {BLOCK_ROWS} each and of {OUTPUTS} together"
    if shape.in_features % UNIT_K:
        return f"{shape.in_features} input features are no multiple of {UNIT_K}"
    return ""


def plan(shape: Shape) -> tuple[Row, ...]:
    """For a shape that is not refused."""
    assert not refusal(shape), shape
    table, rows, served = TABLES[shape.kind], list[Row](), 0
    for few in table.few_of_wide if shape.out_features >= WIDE else table.few:
        variant = few_of(shape, few)
        most = min(
            few.most_rows, variant.max_rows(shape.in_features)
        )  # fewer where x is long: it lies in shared memory
        if most > served:
            rows.append(Row(most, variant))
            served = most
    for max_rows, tiles in table.tiles:
        if max_rows is None or max_rows > served:
            open_to = tuple(tile for tile in tiles if shape.out_features >= tile.least_outputs)
            tile = tile_of(shape, best(shape, open_to, max_rows or ROWS))
            if rows and rows[-1].variant == tile:
                rows.pop()
            rows.append(Row(max_rows, tile))
    return tuple(rows)


def best(shape: Shape, tiles: tuple[TileSettings, ...], num_rows: int) -> TileSettings:
    """The first of equals."""
    return max(tiles, key=lambda tile: worth(shape, tile, num_rows))


def worth(shape: Shape, tile: TileSettings, num_rows: int) -> float:
    """How much of the device multiplies, all the time, for outputs and rows that there are."""
    row_tiles = math.ceil(num_rows / tile.tile)
    useful = num_rows / (row_tiles * tile.tile) * tile.rate
    return useful * (tile.stretched or busy_share(shape, tile, row_tiles))


def busy_share(shape: Shape, tile: TileSettings, row_tiles: int) -> float:
    """Of the device's multiprocessors, all the time, for outputs that there are."""
    wanted = shape.out_features / (64 * tile.rt * tile.wgs) * row_tiles
    tiles = math.ceil(wanted / row_tiles) * row_tiles
    if tiles > MULTIPROCESSORS // 2:
        rounds = math.ceil(tiles / MULTIPROCESSORS)
        return wanted / (rounds * MULTIPROCESSORS) * (ANOTHER_ROUND if rounds > 1 else 1)
    shares = min(MULTIPROCESSORS // tiles, MOST_SHARES, shape.in_features // UNIT_K)
    return wanted * shares / MULTIPROCESSORS


def few_of(shape: Shape, few: FewSettings) -> Few:
    rest = (few.warps, few.tiles, few.wide_table)
    return Few(shape.kind, shape.group_size, is_bf16(shape), few.stages, few.per_sm, few.each, *rest)


def tile_of(shape: Shape, tile: TileSettings) -> Tile:
    size = (tile.tile, tile.rt, tile.wgs, tile.ks)
    rest = (int(tile.stretched > 0), tile.scaled_sums, tile.wide_table)
    found = Tile(shape.kind, shape.group_size, is_bf16(shape), tile.stages, 1, 1, *size, *rest)
    assert most_shared_bytes(2) < found.shared_bytes <= most_shared_bytes(1), found
    return found


def is_bf16(shape: Shape) -> int:
    return int(shape.dtype is torch.bfloat16)


def most_sums() -> int:
    """Float32 numbers that a block of any of the tables' variants leaves for others."""
    return max(
        64 * tile.rt * tile.wgs * tile.tile
        for table in TABLES.values()
        for _, tiles in table.tiles
        for tile in tiles
    )
