"""Which variant serves an 8-bit linear of how many rows: two tables, and why a linear is in neither.

precision/int8, fp8 --Shape--> refusal, or plan --> cuda.py, engine/kernels_ahead

int8 is served behind AFTER_ROWS rows, fp8 where its table has a variant; the others are another kernel's
(kernels/int8_linear, fp8_linear). A plan has a row for each range of numbers of rows, whose end is included;
it follows from the shape alone. Measured in docs/experiments.md, section 9, over the four linears of a layer
of Llama-3.1-8B: int8 one by one with 32 columns of outliers, fp8 also in whole layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from service.kernels.w8_linear.variants import MAX_INPUTS, SHARED_BYTES, SYSTEM_BYTES, Codes, Tile

AFTER_ROWS = 16
DTYPES = (torch.float16, torch.bfloat16)  # of activations
MULTIPLE = 16  # of outputs: rows are stored so; of inputs: the copy engine reads no other rows of codes
WORD_BITS = 32  # of int8's bitmap of columns: a word's end is no column's of a narrower layer
WIDE = 16_384  # outputs, and
DEEP = 8_192  # inputs, from which another variant is the fastest
LEAST_THRESHOLD = 2.0**-14  # below float16 numbers thin out, and bfloat16's would be rounded up to it


class Settings(NamedTuple):
    """Of a variant, for this layer's `Tile`."""

    tile: int
    rt: int
    stages: int
    cap: int = 0
    cuts: bool = False


# by the most rows: for a layer that is narrow and shallow, for a deep one, for a wide one
# None: another kernel serves
Table = tuple[tuple[int | None, tuple[Settings | None, Settings | None, Settings | None]], ...]

FEW, FEW_CUT = Settings(32, 1, 8, 256), Settings(32, 1, 8, 256, cuts=True)
SOME, SOME_CUT = Settings(64, 1, 7, 256), Settings(64, 1, 7, 256, cuts=True)
FLAT, FLAT_CUT = Settings(128, 1, 5, 256), Settings(128, 1, 5, 256, cuts=True)
TALL = Settings(128, 2, 4, 64)
INT8: Table = (
    (32, (FEW_CUT, FEW_CUT, FEW)),
    (64, (SOME_CUT, SOME_CUT, SOME)),
    (128, (FLAT, FLAT_CUT, TALL)),
    (256, (FLAT, FLAT_CUT, Settings(256, 1, 4, 64))),
    (None, (FLAT, TALL, TALL)),
)
# behind the kernels that make the rows Triton's kernel is ahead but for this
FP8: Table = ((4, (None, None, None)), (16, (None, None, Settings(16, 2, 6))))
TABLES: dict[Codes, Table] = {"int8": INT8, "fp8": FP8}


@dataclass(frozen=True)
class Shape:
    """What decides whether and how a linear is served."""

    codes: Codes
    out_features: int
    in_features: int
    dtype: torch.dtype  # of activations
    biased: bool = False
    threshold: float = 0.0  # of int8's outliers; 0: there are none


@dataclass(frozen=True)
class Row:
    """Of a plan: more than `after` rows, up to `max_rows`."""

    after: int
    max_rows: int | None  # None: any number
    variant: Tile

    def has(self, num_rows: int) -> bool:
        return self.after < num_rows and (self.max_rows is None or num_rows <= self.max_rows)


def refusal(shape: Shape) -> str:
    """Why this kernel does not serve it; empty where it does."""
    if shape.dtype not in DTYPES:
        return f"activations are {shape.dtype}, it computes with 16-bit types"
    if shape.out_features % MULTIPLE:
        return f"{shape.out_features} outputs are no multiple of {MULTIPLE}"
    multiple = WORD_BITS if shape.codes == "int8" else MULTIPLE
    if shape.in_features % multiple:
        return f"{shape.in_features} input features are no multiple of {multiple}"
    if shape.codes == "int8" and shape.in_features > MAX_INPUTS:
        return f"{shape.in_features} input features are more than {MAX_INPUTS}"
    if 0 < shape.threshold < LEAST_THRESHOLD:
        return f"threshold {shape.threshold:g} is below {LEAST_THRESHOLD:g}"
    if shape.codes == "fp8" and shape.biased:
        return "it adds no bias to fp8's"
    return "" if any(settings for _, _, settings in settings_of(shape)) else "another kernel is faster"


def plan(shape: Shape) -> tuple[Row, ...]:
    """For a shape that is not refused; what is between its rows, or before them, is another kernel's."""
    assert not refusal(shape), shape
    is_bf16 = int(shape.dtype is torch.bfloat16)
    rows = tuple(
        Row(after, most, tile_of(shape.codes, is_bf16, settings))
        for after, most, settings in settings_of(shape)
        if settings
    )
    assert all(row.variant.shared_bytes <= SHARED_BYTES - SYSTEM_BYTES for row in rows)
    return rows


def row_for(rows: tuple[Row, ...], num_rows: int) -> Row | None:
    """None: another kernel serves so many."""
    return next((row for row in rows if row.has(num_rows)), None)


def settings_of(shape: Shape) -> Iterator[tuple[int, int | None, Settings | None]]:
    """After how many rows, up to how many, and what the table has for them."""
    number = 2 if shape.out_features >= WIDE else int(shape.in_features >= DEEP)
    after = AFTER_ROWS if shape.codes == "int8" else 0
    for most, choices in TABLES[shape.codes]:
        yield after, most, choices[number]
        after = most or after


def tile_of(codes: Codes, bf16: int, settings: Settings) -> Tile:
    return Tile(codes, bf16, *settings)


def most_sums(codes: Codes) -> int:
    """Float32 numbers that a block of any variant leaves for others."""
    choices = (each for _, settings in TABLES[codes] for each in settings if each)
    return max(tile_of(codes, 0, each).sums_of_block for each in choices)
