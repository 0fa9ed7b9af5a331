"""Which variant serves an 8-bit linear behind how many rows: one table, and why a linear is not in it.

precision/int8 --Shape--> refusal, or plan --> cuda.py, engine/kernels_ahead

Up to AFTER_ROWS rows another kernel serves (kernels/int8_linear). A plan has a row for each range of numbers
of rows beyond, whose end is included; it follows from the shape alone. Measured in docs/experiments.md,
section 9, over the four linears of a layer of Llama-3.1-8B with 32 columns of outliers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from service.kernels.w8_linear.variants import MAX_INPUTS, SHARED_BYTES, SYSTEM_BYTES, Tile

AFTER_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)  # of activations
MULTIPLE = 16  # of outputs: rows are stored so
WORD_BITS = 32  # of the bitmap of columns: a word's end is no column's of a narrower layer
WIDE = 16_384  # outputs, and
DEEP = 8_192  # inputs, from which another variant is the fastest
LEAST_THRESHOLD = 2.0**-14  # below float16 numbers thin out, and bfloat16's would be rounded up to it


class Settings(NamedTuple):
    tile: int
    rt: int
    stages: int
    cap: int
    cuts: bool = False


FEW, FEW_CUT = Settings(32, 1, 8, 256), Settings(32, 1, 8, 256, cuts=True)
SOME, SOME_CUT = Settings(64, 1, 7, 256), Settings(64, 1, 7, 256, cuts=True)
FLAT, FLAT_CUT = Settings(128, 1, 5, 256), Settings(128, 1, 5, 256, cuts=True)
TALL = Settings(128, 2, 4, 64)
# by the most rows: for a layer that is narrow and shallow, for a deep one, for a wide one
TILES: tuple[tuple[int | None, tuple[Settings, Settings, Settings]], ...] = (
    (32, (FEW_CUT, FEW_CUT, FEW)),
    (64, (SOME_CUT, SOME_CUT, SOME)),
    (128, (FLAT, FLAT_CUT, TALL)),
    (256, (FLAT, FLAT_CUT, Settings(256, 1, 4, 64))),
    (None, (FLAT, TALL, TALL)),
)


@dataclass(frozen=True)
class Shape:
    """What decides whether and how a linear is served."""

    out_features: int
    in_features: int
    dtype: torch.dtype  # of activations
    threshold: float  # of outliers; 0: there are none


@dataclass(frozen=True)
class Row:
    """Of a plan."""

    max_rows: int | None  # None: any number
    variant: Tile


def refusal(shape: Shape) -> str:
    """Why this kernel does not serve it; empty where it does."""
    if shape.dtype not in DTYPES:
        return f"activations are {shape.dtype}, it computes with 16-bit types"
    if shape.out_features % MULTIPLE:
        return f"{shape.out_features} outputs are no multiple of {MULTIPLE}"
    if shape.in_features % WORD_BITS:
        return f"{shape.in_features} input features are no multiple of {WORD_BITS}"
    if shape.in_features > MAX_INPUTS:
        return f"{shape.in_features} input features are more than {MAX_INPUTS}"
    if 0 < shape.threshold < LEAST_THRESHOLD:
        return f"threshold {shape.threshold:g} is below {LEAST_THRESHOLD:g}"
    return ""


def plan(shape: Shape) -> tuple[Row, ...]:
    """For a shape that is not refused."""
    assert not refusal(shape), shape
    number = 2 if shape.out_features >= WIDE else int(shape.in_features >= DEEP)
    is_bf16 = int(shape.dtype is torch.bfloat16)
    rows = tuple(Row(most, Tile(is_bf16, *settings[number])) for most, settings in TILES)
    assert all(row.variant.shared_bytes <= SHARED_BYTES - SYSTEM_BYTES for row in rows)
    return rows


def most_sums() -> int:
    """Float32 numbers that a block of any variant leaves for others."""
    return max(Tile(0, *each).sums_of_block for _, settings in TILES for each in settings)
