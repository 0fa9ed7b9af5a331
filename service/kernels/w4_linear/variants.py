"""The two kernels' compile-time variants: what the host must know of each to compile and launch it.

plan.py --Few, Tile--> cuda.py; `w4_few.cu` and `w4_tile.cu` assert the same shared memory
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

from service.kernels.cuda import Program
from service.kernels.w4_linear.layout import AFFINE_GROUP, Kind

FOLDER = Path(__file__).parent
MAX_SHARED_BYTES = 232448 - 1024  # dynamic, of a block; the first KiB is the system's
NF4_TABLE = 65536  # address of the few kernel's table of pairs, as large as it


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Variant(ABC):
    """Fields but `kind` are the kernel's definitions, in capitals."""

    kernel: ClassVar[str]
    awaits_predecessor: ClassVar[bool] = False  # may it be placed while the kernel before it works
    kind: Kind

    @property
    def program(self) -> Program:
        settings = {name.upper(): value for name, value in asdict(self).items() if name != "kind"}
        known = {"AFFINE": int(self.kind == "affine"), "SHARED_BYTES": self.shared_bytes} | settings
        return Program(FOLDER / f"{self.kernel}.cu", self.kernel, tuple(known.items()))

    @property
    def name(self) -> str:
        values = (str(getattr(self, field.name)) for field in fields(self) if field.name != "kind")
        return f"{self.kernel} {'x'.join(values)}"

    @property
    @abstractmethod
    def threads(self) -> int: ...

    @property
    @abstractmethod
    def blocks_of_cluster(self) -> int: ...

    @property
    @abstractmethod
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""

    @abstractmethod
    def serves(self, out_features: int, in_features: int) -> bool: ...

    @abstractmethod
    def clusters(self, num_rows: int, out_features: int, resident: int) -> int:
        """Clusters (or blocks) to launch, where `resident` of them run at once."""


@dataclass(frozen=True)
class Few(Variant):
    """Weights stream once past up to 8 nt rows, which stay in registers."""

    kernel = "w4_few"
    cluster: int  # shares of the input features
    kwarps: int  # warps of a share
    rblocks: int  # blocks of 16 outputs at a time
    chunks: int  # of 128 input features, of a warp
    nt: int  # tiles of 8 rows
    stages: int

    @property
    def threads(self) -> int:
        return self.kwarps * self.rblocks * 32

    @property
    def blocks_of_cluster(self) -> int:
        return self.cluster

    @property
    def shared_bytes(self) -> int:
        warps = self.kwarps * self.rblocks
        owned = -(-self.rblocks * 8 * self.nt // self.cluster)
        ring = rounded_up(warps * self.stages * (1088 if self.kind == "affine" else 1136), 128)
        sums = warps * max(2 * (8 * self.nt * 20 + 16) * 4, self.nt * 1024)
        free = 1024 + rounded_up(2 * self.cluster * owned * 64, 128)
        if self.kind == "affine":
            return free + ring + sums - 1024
        before, behind = (ring, sums) if free + ring <= NF4_TABLE else (sums, ring)
        assert free + before <= NF4_TABLE, self
        return 2 * NF4_TABLE + behind - 1024

    def serves(self, out_features: int, in_features: int) -> bool:
        in_a_launch = self.cluster * self.kwarps * self.chunks * AFFINE_GROUP
        return out_features % (16 * self.rblocks) == 0 and in_features == in_a_launch

    def clusters(self, num_rows: int, out_features: int, resident: int) -> int:
        return min(resident, out_features // (16 * self.rblocks))


@dataclass(frozen=True)
class Tile(Variant):
    """Tiles of 64 rt wgs outputs and `tile` rows on the tensor cores' warpgroups."""

    kernel = "w4_tile"
    tile: int
    rt: int  # of 64 outputs, of a warpgroup
    wgs: int  # warpgroups that multiply
    ks: int  # of 64 input features, of a stage
    split: int  # shares of the input features
    share: int  # neighbouring blocks that fetch their rows together
    stages: int
    permuted: int = 0  # of four words, those that NF4 decodes without its table

    @property
    def outputs(self) -> int:
        return 64 * self.rt * self.wgs

    @property
    def threads(self) -> int:
        return (self.wgs + 1) * 128

    @property
    def blocks_of_cluster(self) -> int:
        return self.split * self.share

    @property
    def shared_bytes(self) -> int:
        affine = self.kind == "affine"
        scales = self.outputs * 5 // 2 if affine else self.outputs * self.ks
        stage = rounded_up(self.ks * self.tile * 128 + self.outputs * 32 * self.ks + scales, 1024)
        ring = rounded_up(2304 + self.wgs * 4 * min(self.tile, 64) * 32, 1024) if affine else 65536
        return ring + self.stages * stage - 1024

    def serves(self, out_features: int, in_features: int) -> bool:
        fits_outputs = out_features % (self.outputs * self.share) == 0
        return fits_outputs and in_features % (AFFINE_GROUP * self.split) == 0

    def clusters(self, num_rows: int, out_features: int, resident: int) -> int:
        tiles = out_features // (self.outputs * self.share) * -(-num_rows // self.tile)
        return tiles if self.split > 1 else min(resident, tiles)
