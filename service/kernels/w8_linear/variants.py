"""The kernel's compile-time variants: what the host must know of each to compile and launch it.

plan.py --Tile--> cuda.py; `w8_layout.h` asserts the same shared memory
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from service.kernels.cuda import Program

Codes = Literal["int8", "fp8"]  # of a weight and of rows: LLM.int8()'s, whose outliers are apart, or E4M3

FOLDER = Path(__file__).parent
KERNEL = "w8_tile"
SHARED_BYTES = 228 << 10  # of a multiprocessor
SYSTEM_BYTES = 1 << 10  # of each block's, which are not its own
WARPGROUPS = 2  # that multiply
WARPGROUP, WARP = 128, 32  # threads
STEP = 128  # input features of a stage
MAX_INPUTS = 1 << 15  # whose bits fit beside the stages
GATHERING_ROWS = 128  # of a tile, from which on outliers are gathered for all blocks first


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Tile:
    """Tiles of 128 rt outputs and `tile` rows. Blocks take them whole, or (`cuts`) share those that would
    fill the device only in part."""

    codes: Codes
    bf16: int  # activations are bfloat16, not float16
    tile: int
    rt: int  # of 64 outputs, of a warpgroup
    stages: int  # of the ring through which codes arrive
    cap: int = 0  # int8: listed columns of a part of a tile whose codes are copied as they pass
    cuts: bool = False

    @property
    def program(self) -> Program:
        settings = {"TILE": self.tile, "RT": self.rt, "STAGES": self.stages}
        if self.codes == "int8":
            settings |= {"CAP": self.cap}
        else:
            settings |= {"FP8": 1}
        settings |= {"BF16": self.bf16, "SHARED_BYTES": self.shared_bytes}
        return Program(FOLDER / f"{KERNEL}.cu", KERNEL, tuple(settings.items()))

    @property
    def name(self) -> str:
        return f"{KERNEL} {self.codes} {self.bf16}x{self.tile}x{self.rt}x{self.stages}x{self.cap}"

    @property
    def threads(self) -> int:
        """Of a block: beside the products fp8 has a warp that fetches, int8 also three for outliers."""
        return WARPGROUPS * WARPGROUP + (WARP if self.codes == "fp8" else WARPGROUP)

    @property
    def outputs(self) -> int:
        return 64 * self.rt * WARPGROUPS

    @property
    def gathers(self) -> bool:
        return self.codes == "int8" and self.tile >= GATHERING_ROWS

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        before, rooms = 1024 + 384 + 8 * self.tile, 0
        if self.codes == "int8":
            piece = (
                self.tile if self.tile < 128 or self.rt * self.tile < 256 else 64
            )  # rows with sums as floats
            before, rooms = before + 4096 + 528 + self.outputs * self.cap, 2 * piece * 64
        ring = rounded_up(rounded_up(before, 1024) + rooms + WARPGROUPS * 4 * 512, 1024)
        return ring + self.stages * STEP * (self.outputs + self.tile) - SYSTEM_BYTES

    @property
    def sums_of_block(self) -> int:
        """Float32 numbers that a block may leave for others: of two tiles that it has a part of."""
        return 2 * self.outputs * self.tile if self.cuts else 0

    def work(self, num_rows: int, out_features: int, in_features: int, most_blocks: int) -> tuple[int, int]:
        """-> blocks, and how many tiles they share."""
        tiles, steps = -(-out_features // self.outputs) * -(-num_rows // self.tile), -(-in_features // STEP)
        shared = tiles % most_blocks if self.cuts else 0
        if shared * steps >= most_blocks:
            return most_blocks, shared
        # a block that shares has at least a step
        return (shared * steps, shared) if shared and tiles == shared else (min(tiles, most_blocks), 0)
