"""Which variant of `dense_stream.cu` serves a 16-bit linear of few rows, and what the host must know of it.

bind_linear, engine/kernels_ahead --shape--> plan --> cuda.py

A plan is a row for each range of numbers of rows, whose end is included; more rows than the last are torch's.
It follows from the shape alone: layers and compilation ahead of the first launch share it. The table is what
was measured (docs/experiments.md, section 10): without rows, nobody is served.
"""

from dataclasses import asdict, astuple, dataclass
from pathlib import Path

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


# By the most rows. Empty until docs/experiments.md tells which are fastest, and that they beat the others.
TABLE: tuple[tuple[int, Variant], ...] = ()


def plan(out_features: int, in_features: int, dtype: torch.dtype) -> tuple[Row, ...]:
    """Empty for a shape that is not served."""
    is_served = (
        dtype in DTYPES
        and out_features * in_features * dtype.itemsize >= LEAST_BYTES
        and out_features <= MAX_OUTPUTS
        and out_features % OUTPUTS == 0
        and in_features % INPUTS == 0
    )
    bf16 = int(dtype is torch.bfloat16)
    return tuple(Row(most, _typed(variant, bf16)) for most, variant in TABLE) if is_served else ()


def most_sums() -> int:
    """Of the blocks of a multiprocessor, of any of the table's variants."""
    return max(variant.sums_of_block * variant.per_sm for _, variant in TABLE)


def _typed(variant: Variant, bf16: int) -> Variant:
    return Variant(**(asdict(variant) | {"bf16": bf16}))
