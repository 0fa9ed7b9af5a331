"""Which kernel, in which tiles, multiplies how many rows with which layer, as measured on an H100.

Both tables were timed over the four linears of a layer of Llama-3.1-8B with 32 columns of outliers
(docs/experiments.md); a layer of another shape takes what its nearest relative takes.
"""

from dataclasses import dataclass

FEW_ROWS = 64  # up to here all levels of codes are one product
PLACES = (4, 16, 32, FEW_ROWS)  # numbers of rows that its kernel is compiled for
PROGRAMS = 128  # at least so many share a weight of few outputs: about one a multiprocessor of an H100
MAX_SPLITS = 8
WIDE = 16_384  # outputs, and
DEEP = 8_192  # inputs, from which another tile is the fastest


@dataclass(frozen=True)
class Tile:
    """Of few rows: what a program computes of the weight at a time."""

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Block:
    """Of many rows: what a program computes of y, and how many inputs it takes at a time."""

    rows: int
    outputs: int
    inputs: int
    num_warps: int
    num_stages: int


# up to so many rows: for a layer that is narrow and shallow, for a deep one, for a wide one
TILES = (
    (4, (Tile(64, 256, 4, 3), Tile(128, 256, 4, 3), Tile(128, 256, 4, 3))),
    (16, (Tile(64, 128, 4, 6), Tile(64, 128, 4, 6), Tile(128, 256, 8, 2))),
    (FEW_ROWS, (Tile(64, 128, 4, 4), Tile(128, 128, 8, 4), Tile(128, 128, 8, 4))),
)
BLOCKS = (
    (256, (Block(64, 128, 128, 8, 4), Block(64, 128, 128, 8, 4), Block(128, 128, 128, 8, 4))),
    (1 << 31, (Block(128, 128, 128, 8, 4),) * 3),
)
KERNEL_ROWS = tuple(sorted({*PLACES, *(most for most, _ in (*TILES, *BLOCKS[:-1]))}))  # most rows of each


def tile_for(num_rows: int, in_features: int, out_features: int) -> Tile:
    """Of up to FEW_ROWS rows."""
    return next(tiles for most, tiles in TILES if num_rows <= most)[shape_of(in_features, out_features)]


def block_for(num_rows: int, in_features: int, out_features: int) -> Block:
    """Of any number of rows."""
    return next(blocks for most, blocks in BLOCKS if num_rows <= most)[shape_of(in_features, out_features)]


def splits_of(in_features: int, out_features: int, tile: Tile, programs: int = PROGRAMS) -> int:
    """The least power of two that makes `programs` of few rows, if each has a whole tile of inputs."""
    tiles, splits = -(-out_features // tile.outputs), 1
    while splits < MAX_SPLITS and tiles * splits < programs and 2 * splits * tile.inputs <= in_features:
        splits *= 2
    return splits


def shape_of(in_features: int, out_features: int) -> int:
    """Which of a row's three: 0 narrow and shallow, 1 deep, 2 wide."""
    return 2 if out_features >= WIDE else int(in_features >= DEEP)
