"""Whom `gated_tile.cu` serves, and what the host must know of it.

bind, engine/kernels_ahead --shape--> variant_of --> cuda.py --outputs--> served_rows

There is one kernel. Its time goes in rounds: in each a pair of blocks takes a tile of 256 rows and 128
outputs, full or not. cuBLAS has more sizes of tiles, so this one serves where little of its rounds is empty.
Measured at 28,672 x 4,096 (docs/experiments.md, section 15): ahead at 768, 1,024 and 2,048 rows, where rounds
are 85 to 97 % full; not ahead at 512, where they are as full as at 768. More rows were not measured.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from service.kernels.cuda import Program

FOLDER = Path(__file__).parent
DTYPES = (torch.float16, torch.bfloat16)
TILE_ROWS, TILE_OUTPUTS, INPUTS = 128, 128, 64  # of a block; and inputs of a stage
PAIR = 2  # blocks, one row tile below the other
PIECE_ROWS, PIECE_OUTPUTS = 16, 64  # of y, that a warp stores at a time
WARPS, STAGES, BARRIER_BYTES = 8, 4, 1024
THREADS = WARPS * 32 + 128
MIN_ROWS, MAX_ROWS = 768, 2048
LEAST_FULL = 0.84  # of the rounds
LEAST_INPUTS = 2048  # fewer: writing an output takes more than a tenth of multiplying it
ALIGNED = 8  # outputs and inputs are multiples of: rows begin at 16 bytes


@dataclass(frozen=True)
class Variant:
    """Fields are the kernel's definitions, in capitals."""

    bf16: int

    @property
    def name(self) -> str:
        return f"gated_tile {self.bf16}"

    @property
    def program(self) -> Program:
        told = (("SHARED_BYTES", self.shared_bytes), ("BF16", self.bf16))
        return Program(FOLDER / "gated_tile.cu", "gated_tile", told)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same."""
        pieces = WARPS * 2 * PIECE_ROWS * PIECE_OUTPUTS * 2
        return BARRIER_BYTES + pieces + STAGES * (2 * TILE_OUTPUTS + TILE_ROWS) * INPUTS * 2


def variant_of(out_features: int, in_features: int, dtype: torch.dtype) -> Variant | None:
    """Of a weight of gates over ups; None for a shape that is not served."""
    is_served = (
        dtype in DTYPES
        and out_features % (2 * ALIGNED) == 0
        and in_features % ALIGNED == 0
        and in_features >= LEAST_INPUTS
    )
    return Variant(int(dtype is torch.bfloat16)) if is_served else None


@cache
def served_rows(num_outputs: int, num_pairs: int) -> frozenset[int]:
    """Numbers of rows for which it is worth it, where so many pairs of blocks run at once."""
    return frozenset(
        rows for rows in range(MIN_ROWS, MAX_ROWS + 1) if fullness(rows, num_outputs, num_pairs) >= LEAST_FULL
    )


def fullness(num_rows: int, num_outputs: int, num_pairs: int) -> float:
    """Share of the rounds' room that has an output."""
    tiles = -(-num_rows // (PAIR * TILE_ROWS)) * -(-num_outputs // TILE_OUTPUTS)
    rounds = -(-tiles // num_pairs)
    return num_rows * num_outputs / (rounds * num_pairs * PAIR * TILE_ROWS * TILE_OUTPUTS)
