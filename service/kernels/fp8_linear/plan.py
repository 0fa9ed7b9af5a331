"""In which tiles few rows are multiplied with which E4M3 layer, as measured on an H100.

Timed over the four linears of a layer of Llama-3.1-8B (docs/experiments.md). From there on torch's scaled
matmul is as fast.
"""

from service.kernels.int8_linear.plan import Tile, shape_of

FEW_ROWS = 64
PLACES = (16, 32, FEW_ROWS)  # numbers of rows that the kernel is compiled for
TILES = (
    (4, (Tile(64, 256, 4, 4), Tile(64, 256, 4, 4), Tile(128, 128, 4, 5))),
    (16, (Tile(64, 128, 4, 6), Tile(64, 128, 4, 6), Tile(128, 256, 8, 2))),
    (FEW_ROWS, (Tile(64, 128, 4, 4), Tile(64, 128, 4, 4), Tile(128, 128, 8, 4))),
)
KERNEL_ROWS = tuple(sorted({*PLACES, *(most for most, _ in TILES)}))  # most rows of each kernel here


def tile_for(num_rows: int, in_features: int, out_features: int) -> Tile:
    """Of up to FEW_ROWS rows."""
    return next(tiles for most, tiles in TILES if num_rows <= most)[shape_of(in_features, out_features)]
