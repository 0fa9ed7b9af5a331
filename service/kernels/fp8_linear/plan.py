"""How few rows are multiplied with which E4M3 layer on a GPU, as measured on an H100.

Timed behind the kernels that make their rows, over layers of Llama-3.1-8B (docs/experiments.md, section 9); a
layer of another shape takes what its nearest relative takes. Where kernels/w8_linear serves, its table comes
first. From FEW_ROWS rows on torch's scaled matmul is as fast.
"""

from typing import NamedTuple

from service.kernels.int8_linear.plan import PROGRAMS, Tile, shape_of, splits_of

FEW_ROWS = 64
PLACES = (16, 32, FEW_ROWS)  # numbers of rows that the kernel is compiled for


class Setting(NamedTuple):
    """Of Triton's kernel for a layer."""

    tile: Tile
    programs: int = PROGRAMS  # at least so many share a weight of few outputs


AT_ONE = Setting(Tile(64, 128, 4, 6), 2 * PROGRAMS)
AT_SOME = Setting(Tile(64, 256, 4, 4))
AT_MORE = Setting(Tile(64, 128, 4, 4))
# by the most rows: for a layer that is narrow and shallow, for a deep one, for a wide one
SETTINGS = (
    (4, (AT_ONE, Setting(Tile(128, 256, 8, 3), 2 * PROGRAMS), Setting(Tile(64, 256, 4, 4)))),
    (32, (AT_SOME, AT_SOME, Setting(Tile(128, 256, 8, 3)))),
    (FEW_ROWS, (AT_MORE, Setting(Tile(64, 256, 4, 3), 2 * PROGRAMS), Setting(Tile(128, 128, 8, 4)))),
)
KERNEL_ROWS = tuple(sorted({*PLACES, *(most for most, _ in SETTINGS)}))  # most rows of each kernel here


def setting_for(num_rows: int, in_features: int, out_features: int) -> Setting:
    """Of up to FEW_ROWS rows."""
    found = next(settings for most, settings in SETTINGS if num_rows <= most)
    return found[shape_of(in_features, out_features)]


def splits_for(in_features: int, out_features: int, setting: Setting) -> int:
    """Of the inputs."""
    return splits_of(in_features, out_features, setting.tile, setting.programs)
