"""Variants of production's w8_tile.cu: their constants, what they need, nvcc, and how a tile's work is cut."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.kernels.cuda import Program

KERNELS = Path(__file__).parents[2] / "service" / "kernels"
SOURCE = KERNELS / "w8_linear" / "w8_tile.cu"
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
WARPGROUP, WARP, STEP = 128, 32, 128  # threads; STEP: of K


@dataclass(frozen=True, order=True)
class Kernel:
    """R = 128 * rt outputs x `tile` rows of activations; the constants of w8_layout.h."""

    fp8: int
    tile: int
    rt: int
    stages: int
    cap: int = 32
    per_sm: int = 1
    bf16: int = 0

    @property
    def outputs(self) -> int:
        return 128 * self.rt

    @property
    def threads(self) -> int:
        return 2 * WARPGROUP + (WARP if self.fp8 else WARPGROUP)

    @property
    def program(self) -> "Program":
        from service.kernels.cuda import Program

        return Program(SOURCE, "w8_tile", tuple(self.defines.items()))

    @property
    def file(self) -> str:
        return "_".join(["w8", *(f"{name.lower()}{value}" for name, value in self.constants.items())])

    @property
    def constants(self) -> dict[str, int]:
        return {"FP8": self.fp8, "TILE": self.tile, "RT": self.rt, "STAGES": self.stages, "CAP": self.cap,
                "PER_SM": self.per_sm, "BF16": self.bf16}  # fmt: skip

    @property
    def defines(self) -> dict[str, int]:
        return {**self.constants, "SHARED_BYTES": self.shared_bytes}

    @property
    def shared_bytes(self) -> int:
        """As w8_layout.h has it, which asserts the same."""

        def whole(size: int) -> int:
            return -(-size // 1024) * 1024

        before = 1024 + 384 + 8 * self.tile
        if not self.fp8:
            before += 4096 + 528 + self.outputs * self.cap
        piece = self.tile if self.rt * self.tile < 256 else 64
        out = whole(before) + (0 if self.fp8 else 2 * piece * 32 * 2)
        return whole(out + 2 * 4 * 512) + self.stages * 128 * (self.outputs + self.tile) - 1024

    def compile(self, folder: Path) -> str:
        """-> what nvcc complained about: errors, spills, serialized products."""
        flags = [f"-D{name}={value}" for name, value in self.defines.items()]
        command = ["nvcc", "-cubin", "-arch=sm_90a", "-std=c++17", "-O3", "-Xptxas", "-v", *flags]
        command += ["-I", str(KERNELS / "cuda"), "-o", str(folder / self.file), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if "error" in line or "C75" in line]
        spills = [line.strip() for line in done.stderr.splitlines() if "spill" in line]
        return "; ".join(lines + [line for line in spills if not line.startswith("0 bytes stack")])

    def tiles(self, n: int, rows: int) -> int:
        return -(-n // self.outputs) * -(-rows // self.tile)

    def workspace_bytes(self, blocks: int) -> int:
        """Two partial tiles of each block."""
        return 2 * blocks * self.outputs * self.tile * 4


def cut(kernel: Kernel, how: str, n: int, k: int, rows: int, multiprocessors: int) -> tuple[int, int]:
    """-> blocks, and how many tiles are cut at steps of K instead of going whole to a block.

    whole: none. rest: those that would fill the machine only in part. all: every one.
    """
    tiles, steps = kernel.tiles(n, rows), -(-k // STEP)
    if how == "whole":
        return min(tiles, multiprocessors), 0
    stream = tiles % multiprocessors if how == "rest" else tiles
    assert stream * steps >= multiprocessors or stream == 0
    return multiprocessors, stream


# by rows; (tile, rt, stages, cap, per_sm, bf16)
INT8 = {
    1: ((16, 1, 9, 256), (16, 2, 5, 64), (16, 1, 5, 64, 2)),
    16: ((16, 1, 9, 256), (16, 2, 5, 64), (16, 1, 5, 64, 2)),
    64: ((64, 1, 7, 256), (64, 2, 4, 64), (64, 1, 7, 256, 1, 1)),
    256: ((128, 1, 5, 256), (256, 1, 4, 64)),
    1024: ((128, 1, 5, 256), (128, 2, 4, 64), (256, 1, 4, 64), (128, 2, 4, 64, 1, 1)),
}
FP8 = {
    1: ((16, 1, 10), (16, 2, 6), (16, 1, 5, 32, 2)),
    16: ((16, 1, 10), (16, 1, 5, 32, 2)),
    64: ((64, 1, 8), (64, 2, 5)),
}  # torch's product is ahead behind them


def kernels_for(rows: int) -> list[Kernel]:
    return [Kernel(0, *c) for c in INT8[rows]] + [Kernel(1, *c) for c in FP8.get(rows, ())]


def all_kernels() -> list[Kernel]:
    return sorted({kernel for rows in INT8 for kernel in kernels_for(rows)})
