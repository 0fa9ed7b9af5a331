"""Which variant of `decode_attention.cu` serves how many sequences of which model, and who is refused why.

decoder, engine/kernels_ahead --Shape--> plan --> cuda.py

A plan is a row for each range of numbers of sequences, whose end is included. It follows from the shape
alone: steps and compilation ahead of the first launch share it. The number of sequences chooses, never a
length, which only the device knows.
"""

from dataclasses import dataclass
from functools import cache

import torch

from service.kernels.decode_attention.variants import Variant

DTYPES = (torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)  # a variant's 1 and 2
HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUP = 16


@dataclass(frozen=True)
class Shape:
    """What decides whether and how a model's decodes are served."""

    head_dim: int
    num_heads: int
    num_kv_heads: int
    dtype: torch.dtype  # of activations
    kv_dtype: torch.dtype
    is_normed: bool = False  # q and k are, before they are rotated
    is_capped: bool = False  # scores are, softly

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Settings:
    """Of a variant, what a shape leaves open."""

    warps: int
    stages: int
    splits: int


@dataclass(frozen=True)
class Row:
    """Of a plan."""

    max_sequences: int | None  # None: any number
    variant: Variant


# By the most pairs of a sequence and a KV head: where they are few, several blocks share one, so that all
# multiprocessors read; where they are many, none does. Measured in docs/experiments.md, section 12.
Table = tuple[tuple[int | None, Settings], ...]
TABLE: Table = (
    (8, Settings(4, 2, 16)),
    (32, Settings(4, 2, 8)),
    (96, Settings(4, 2, 4)),
    (256, Settings(4, 3, 2)),
    (None, Settings(8, 3, 1)),
)


def refusal(shape: Shape) -> str:
    """Why this kernel does not serve it; empty where it does."""
    if shape.dtype not in DTYPES:
        return f"activations are {shape.dtype}, it computes with 16-bit types"
    if shape.kv_dtype not in (shape.dtype, *CODES):
        return f"the KV cache is of {shape.kv_dtype}, it reads activations' own type, or 8-bit codes"
    if shape.head_dim not in HEAD_DIMS:
        return f"heads have {shape.head_dim} dimensions, it has {', '.join(map(str, HEAD_DIMS))}"
    if shape.group > MAX_GROUP:
        return f"{shape.group} query heads share a KV head, it takes {MAX_GROUP}"
    return ""


def plan(shape: Shape) -> tuple[Row, ...]:
    """Empty for a shape that is not served."""
    return () if refusal(shape) else rows_of(shape, TABLE)


@cache
def rows_of(shape: Shape, table: Table) -> tuple[Row, ...]:
    """A table's settings for a shape that is not refused."""
    rows: list[Row] = []
    for max_pairs, settings in table:
        variant, max_sequences = variant_of(shape, settings), None
        if max_pairs is not None:
            max_sequences = max_pairs // shape.num_kv_heads
            if max_sequences <= ((rows[-1].max_sequences or 0) if rows else 0):
                continue
        rows.append(Row(max_sequences, variant))
    return tuple(rows)


def variant_of(shape: Shape, settings: Settings) -> Variant:
    """A page of large heads takes twice the room: half as many warps."""
    warps = max(1, settings.warps // 2) if shape.head_dim > 128 else settings.warps
    codes = 1 + CODES.index(shape.kv_dtype) if shape.kv_dtype in CODES else 0
    fixed = (shape.head_dim, shape.group, int(shape.dtype is torch.bfloat16), codes)
    flags = (int(shape.is_normed), int(shape.is_capped))
    return Variant(*fixed, *flags, warps, settings.stages, settings.splits)


def pages_of(variant: Variant) -> torch.dtype:
    """What a variant's pages are of."""
    return CODES[variant.codes - 1] if variant.codes else DTYPES[variant.bf16]


def row_for(rows: tuple[Row, ...], num_sequences: int) -> Row:
    """The first that takes so many."""
    return next(row for row in rows if row.max_sequences is None or num_sequences <= row.max_sequences)
