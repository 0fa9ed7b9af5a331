"""The two kernels' compile-time variants: what the host must know of each to compile and launch it.

plan.py --Few, Tile--> cuda.py; `w4_few.cu` and `w4_tile.cu` assert the same shared memory
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from service.kernels.cuda import Program
from service.kernels.w4_linear.layout import BLOCK_ROWS, TILE_BYTES, Kind

FOLDER = Path(__file__).parent
SHARED_BYTES = 228 << 10  # of a multiprocessor
SHARED_STEP = 128
SYSTEM_BYTES = 1 << 10  # of each block's, which are not its own
NOT_DEFINED = ("kind", "each")  # fields that no kernel is compiled for


def most_shared_bytes(each: int) -> int:
    """Dynamic shared memory of a block, where so many share a multiprocessor."""
    return SHARED_BYTES // each - SYSTEM_BYTES


def table_bytes(wide_table: int) -> int:
    """Of NF4's pairs of levels, one copy for each bank of shared memory."""
    return 64 << 10 if wide_table else 32 << 10


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Variant(ABC):
    """Fields are the kernel's definitions, in capitals, but for `kind` and `each`.

    The kernels wait themselves for the one before them, so that they may be placed while it works.
    """

    kernel: ClassVar[str]
    kind: Kind
    group: int  # weights of an output under one scale
    bf16: int  # activations are bfloat16, not float16
    stages: int  # of the ring through which weights arrive
    per_sm: int  # blocks that registers leave room for: two, and the next launch's wait beside this one's
    each: int  # blocks of a launch on a multiprocessor

    @property
    def program(self) -> Program:
        settings = {name.upper(): value for name, value in asdict(self).items() if name not in NOT_DEFINED}
        codes = {"AFFINE": int(self.is_affine), "BITS": 3 if self.kind == "int3" else 4}
        known = codes | {"SHARED_BYTES": self.shared_bytes} | settings
        return Program(FOLDER / f"{self.kernel}.cu", self.kernel, tuple(known.items()))

    @property
    def is_affine(self) -> bool:
        """Codes are numbers beside a zero, not places in a table of levels."""
        return self.kind != "nf4"

    @property
    def name(self) -> str:
        values = (str(getattr(self, field.name)) for field in fields(self))
        return f"{self.kernel} {'x'.join(values)}"

    @property
    @abstractmethod
    def threads(self) -> int: ...

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, but for what grows with the rows."""

    @abstractmethod
    def shared_bytes_for(self, num_rows: int, in_features: int) -> int: ...


@dataclass(frozen=True)
class Few(Variant):
    """Weights stream once past up to 8 or 16 rows; every block has all input features."""

    kernel = "w4_few"
    warps: int
    tiles: int  # of 8 rows
    wide_table: int  # NF4's: fewer instructions, more shared memory

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def shared_bytes(self) -> int:
        side = 48 * (128 // self.group) if self.is_affine else 32
        chunk = 2 * TILE_BYTES[self.kind] + side
        table = 1024 if self.is_affine else 2048 + table_bytes(self.wide_table)
        return rounded_up(table + self.warps * self.stages * chunk, 128) - 1024

    def shared_bytes_for(self, num_rows: int, in_features: int) -> int:
        """More than it uses, where one more block would fit: multiprocessors left without one wait for it."""
        used = self.shared_bytes + num_rows * self.row_bytes(in_features)
        return max(used, most_shared_bytes(self.each + 1) + SHARED_STEP)

    def row_bytes(self, in_features: int) -> int:
        """A row of activations, and twice its sums of each warp."""
        return 128 * self.warps + 2 * in_features + 64

    def max_rows(self, in_features: int) -> int:
        """0 where not even one row fits."""
        room = most_shared_bytes(self.each) - self.shared_bytes
        return max(0, min(8 * self.tiles, room // self.row_bytes(in_features)))


@dataclass(frozen=True)
class Tile(Variant):
    """Tiles of 64 rt wgs outputs and `tile` rows on the tensor cores' warpgroups, cut over all blocks."""

    kernel = "w4_tile"
    tile: int
    rt: int  # of 64 outputs, of a warpgroup
    wgs: int  # warpgroups that multiply
    ks: int  # of 64 input features, of a stage
    stretched: (
        int  # tiles lie end to end and are cut alike for all blocks; else each into as many shares as fit
    )
    scaled_sums: int  # scales are applied to sums in float32, not to weights
    wide_table: int  # NF4's, as above

    @property
    def outputs(self) -> int:
        return 64 * self.rt * self.wgs

    @property
    def threads(self) -> int:
        return (self.wgs + 1) * 128

    @property
    def shared_bytes(self) -> int:
        affine = self.is_affine
        scales = (self.outputs * 5 // 2 if affine else self.outputs) * (self.ks if self.group == 64 else 1)
        codes = self.outputs // BLOCK_ROWS * TILE_BYTES[self.kind] * self.ks
        stage = rounded_up(self.ks * self.tile * 128 + codes + scales, 1024)
        table = rounded_up((1280 if affine else 2304) + self.wgs * 4 * min(self.tile, 16) * 32, 1024)
        return table + (0 if affine else table_bytes(self.wide_table)) + self.stages * stage - 1024

    def shared_bytes_for(self, num_rows: int, in_features: int) -> int:
        return self.shared_bytes

    @property
    def sums_of_block(self) -> int:
        """Float32 numbers that a block may leave for others: its part of a tile."""
        return self.outputs * self.tile
