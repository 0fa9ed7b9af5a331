"""Which kernel and variant serves a W4 linear behind how many rows: one table, and why a linear is not in it.

precision/awq, nf4 --Shape--> refusal, or plan --> cuda.py, engine/kernels_ahead

A plan is a row for each range of numbers of rows, whose end is included. It follows from shape and kind
alone: layers, self-check and compilation ahead of the first launch share it. Measured in
docs/experiments.md, section 6.
"""

from dataclasses import dataclass

import torch

from service.kernels.w4_linear.layout import AFFINE_GROUP, Kind
from service.kernels.w4_linear.variants import MAX_SHARED_BYTES, Few, Tile, Variant

MULTIPROCESSORS = 132  # of the H100 that the table was measured on
PAIRS_RESIDENT = 66  # clusters of two blocks that it holds at once; of four only 30, so none is used
MAX_PARTS = 4  # of a merged layer, as w4_device.h has it
WARPS = 16  # of a block of w4_few, where registers allow no more
MAX_CHUNKS = {1: 4, 2: 2}  # of a warp of w4_few, by tiles of 8 rows: activations stay in registers
OUTPUTS = 128  # that the outputs are a multiple of: the least tile
DTYPES = (torch.float16,)  # of activations


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
    group_size = AFFINE_GROUP if shape.kind == "affine" else 64
    if shape.dtype not in DTYPES:
        return f"activations are {shape.dtype}, they compute with float16"
    if shape.group_size != group_size:
        return f"groups are of {shape.group_size} weights, they read {group_size}"
    if not shape.is_nested:
        return "absmax values are float32, they read the 8-bit codes of double quantization"
    if len(shape.outs) > MAX_PARTS:
        return f"{len(shape.outs)} linears share an input, they take {MAX_PARTS}"
    if any(out % 16 for out in shape.outs) or shape.out_features % OUTPUTS:
        return f"outputs {list(shape.outs)} are no multiple of 16 each and of {OUTPUTS} together"
    if shape.in_features % AFFINE_GROUP:
        return f"{shape.in_features} input features are no multiple of {AFFINE_GROUP}"
    if any(few(shape, tiles) is None for tiles in (1, 2)):
        return f"{shape.in_features} input features cannot be cut into equal shares of whole warps"
    return ""


def plan(shape: Shape) -> tuple[Row, ...]:
    """For a shape that is not refused."""
    assert not refusal(shape), shape
    least, more = few(shape, 1), few(shape, 2)
    assert least is not None
    assert more is not None
    rows = (Row(8, least), Row(16, more), *(Row(end, tile(shape, end)) for end in (32, 64, 128, 256, None)))
    for row in rows:
        assert row.variant.serves(shape.out_features, shape.in_features), (shape, row)
        assert row.variant.shared_bytes <= MAX_SHARED_BYTES, row
    return rows


def few(shape: Shape, row_tiles: int) -> Few | None:
    """The fewest shares of the input features whose blocks hold them, then the most warps of a block."""
    chunks = shape.in_features // AFFINE_GROUP
    for cluster in (1, 2, 4, 8):
        for chunks_of_warp in range(1, MAX_CHUNKS[row_tiles] + 1):
            warps, rest = divmod(chunks, cluster * chunks_of_warp)
            if not rest and 1 <= warps <= WARPS:
                return Few(shape.kind, cluster, warps, 1, chunks_of_warp, row_tiles, 3 if cluster == 1 else 4)
    return None


def tile(shape: Shape, max_rows: int | None) -> Tile:
    """Tall tiles where they alone fill the device; else smaller ones, and the input features in two shares
    where pairs of blocks fill it."""
    kind, out_features = shape.kind, shape.out_features
    if max_rows is None:
        return Tile(kind, 256, 1, 2, 1, 1, 1, 4)
    is_wide = out_features % 256 == 0 and out_features // 256 >= MULTIPROCESSORS // 2
    if max_rows == 256:
        halves = 2  # tiles of 128 rows
        for warpgroups in (2, 3):
            outputs = 64 * warpgroups
            if out_features % outputs == 0 and out_features // outputs * halves <= PAIRS_RESIDENT:
                return Tile(kind, 128, 1, warpgroups, 1, shares(shape), 1, 6)
        return Tile(kind, 256, 1, 2, 1, 1, 1, 4)
    inner, stages, more_stages = {32: (2, 5, 6), 64: (2, 4, 5), 128: (1, 6, 6)}[max_rows]
    if is_wide:
        return Tile(kind, max_rows, 2, 2, inner, 1, 1, stages)
    split = shares(shape) if out_features // OUTPUTS <= PAIRS_RESIDENT else 1
    return Tile(kind, max_rows, 1, 2, inner, split, 1, more_stages)


def shares(shape: Shape) -> int:
    """Of the input features, which are cut in whole groups."""
    return 2 if shape.in_features % (2 * AFFINE_GROUP) == 0 else 1
