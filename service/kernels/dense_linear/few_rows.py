"""Which variant of `dense_stream.cu` serves a 16-bit linear of few rows, and what the host must know of it.

bind_linear, engine/kernels_ahead --shape--> plan --> cuda.py

A plan is a row for each range of numbers of rows, whose end is included; more rows than the last are torch's.
It follows from the shape alone: layers and compilation ahead of the first launch share it. The table is what
was measured (docs/experiments.md, section 10): weights of fewer outputs are read faster by triton.py.
"""

from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from service.kernels.cuda import Program

FOLDER = Path(__file__).parent
DTYPES = (torch.float16, torch.bfloat16)
LEAST_BYTES = 16 << 20  # smaller weights live in the L2 cache, which torch's kernels read as fast
OUTPUTS, INPUTS = 8, 64  # that a weight's are multiples of
MAX_OUTPUTS = 1 << 24  # numbers of steps stay below 2^31
PIECE_BYTES, BARRIER_BYTES = 256, 512


@dataclass(frozen=True)
class Variant:
    """Fields are the kernel's definitions, in capitals."""

    tile: int  # rows of x
    rt: int  # times 64 outputs, of a warpgroup
    wgs: int  # warpgroups
    ks: int  # times 64 inputs, of a stage
    stages: int
    share: int = 1  # blocks that fetch x together
    per_sm: int = 1  # blocks on a multiprocessor
    ahead: int = 0  # stages of weights that come into the L2 cache while the predecessor works
    early: int = 0  # the successor may begin at once, else when this launch has asked for its last weights
    bf16: int = 0

    @property
    def name(self) -> str:
        return f"dense_stream {'x'.join(map(str, astuple(self)))}"

    @property
    def program(self) -> Program:
        settings = {name.upper(): value for name, value in asdict(self).items()}
        known = {"SHARED_BYTES": self.shared_bytes} | settings
        return Program(FOLDER / "dense_stream.cu", "dense_stream", tuple(known.items()))

    @property
    def outputs(self) -> int:
        return 64 * self.rt * self.wgs

    @property
    def threads(self) -> int:
        """The warp that fetches is a whole group of warps where registers move to those that multiply."""
        return self.wgs * 128 + (128 if self.rt * self.tile >= 128 else 32)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same."""
        ring = -(-(BARRIER_BYTES + self.wgs * 4 * PIECE_BYTES) // 1024) * 1024
        return ring + self.stages * self.ks * (self.outputs + self.tile) * 128

    @property
    def sums_of_block(self) -> int:
        """Float32 numbers that a block may leave for others: of two tiles that it has a part of."""
        return 2 * self.outputs * self.tile


@dataclass(frozen=True)
class Row:
    """Of a plan."""

    max_rows: int
    variant: Variant


class Entry(NamedTuple):
    """Of the table."""

    max_rows: int
    least_outputs: int  # of a weight: with fewer, adding up parts of tiles costs more than it gains
    variant: Variant


# In turn by the most rows.
TABLE: tuple[Entry, ...] = (
    Entry(8, 6144, Variant(8, 1, 1, 4, 6)),
    Entry(16, 6144, Variant(16, 1, 1, 2, 5, early=1)),
    Entry(32, 6144, Variant(32, 1, 1, 2, 8)),
    Entry(64, 16384, Variant(64, 1, 1, 2, 6)),
)


def plan(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Row, ...]:
    """Empty for a shape that is not served."""
    is_served = (
        dtype in DTYPES
        and out_features * in_features * dtype.itemsize >= LEAST_BYTES
        and out_features <= MAX_OUTPUTS
        and out_features % OUTPUTS == 0
        and in_features % INPUTS == 0
    )
    if not is_served:
        return ()
    bf16 = int(dtype is torch.bfloat16)
    serving = (entry for entry in TABLE if out_features >= entry.least_outputs)
    return tuple(Row(entry.max_rows, _typed(entry.variant, bf16)) for entry in serving)


def most_sums() -> int:
    """Of the blocks of a multiprocessor, of any of the table's variants."""
    return max(entry.variant.sums_of_block * entry.variant.per_sm for entry in TABLE)


def _typed(variant: Variant, bf16: int) -> Variant:
    return Variant(**(asdict(variant) | {"bf16": bf16}))
