"""The kernel's compile-time variants: what the host must know of each to compile and launch it.

table.py --Variant--> cuda.py; `decode_attention.cu` asserts the same shared memory
"""

from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from service.kernels.cuda import Program

FOLDER = Path(__file__).parent
PAGE_TOKENS = 16
BOX_BYTES = 128  # of a token and head, that one copy brings
SHARED_BYTES, SYSTEM_BYTES = 228 << 10, 1 << 10  # of a multiprocessor; of each block's, not its own
REGISTERS = 64 << 10  # of a multiprocessor
SCALES_BYTES = 4  # of a token and head
PORTABLE_SPLITS = 8  # a cluster of more blocks has to be allowed


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Variant:
    """Fields are the kernel's definitions, in capitals."""

    dim: int
    group: int  # query heads of a KV head
    bf16: int  # activations are bfloat16, not float16
    codes: int  # pages hold 0: numbers of that type; 8-bit codes, 1: int8, 2: E4M3
    normed: int  # q and k are normed
    capped: int  # scores are, softly
    warps: int  # of a block
    stages: int  # pages in the ring of a warp
    splits: int  # blocks, a cluster, that share a sequence's KV head

    @property
    def name(self) -> str:
        return f"decode_attention {'x'.join(map(str, astuple(self)))}"

    @property
    def program(self) -> Program:
        settings = {name.upper(): value for name, value in asdict(self).items()}
        known = {"SHARED_BYTES": self.shared_bytes, "PER_SM": self.per_sm} | settings
        return Program(FOLDER / "decode_attention.cu", "decode_attention", tuple(known.items()))

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def heads(self) -> int:
        """The group as the tensor cores take it."""
        return rounded_up(self.group, 8)

    @property
    def number_bytes(self) -> int:
        """Of K and V."""
        return 1 if self.codes else 2

    @property
    def stage_bytes(self) -> int:
        """A page of K and of V."""
        return 2 * PAGE_TOKENS * rounded_up(self.number_bytes * self.dim, BOX_BYTES)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same."""
        barriers = rounded_up(8 * (self.warps * self.stages + 1), 16)
        queries = barriers + self.heads * (2 * self.dim + 16)
        fresh = queries + 2 * self.number_bytes * self.dim
        if self.codes:
            fresh += 16 + self.warps * self.stages * PAGE_TOKENS * SCALES_BYTES
        states = rounded_up(fresh + self.warps * self.heads * 8, 16)
        parts = 0
        if self.splits > 1:
            parts = self.splits * 16 * (-(-self.group * self.dim // 4 // self.splits) + self.heads)
        sums = self.heads * (self.dim + 4) * 4
        ring = max(self.stages * self.stage_bytes, rounded_up(sums, 1024))
        return rounded_up(states + parts, 1024) + self.warps * ring

    @property
    def per_sm(self) -> int:
        """Blocks for which shared memory and registers leave room."""
        by_memory = SHARED_BYTES // (self.shared_bytes + SYSTEM_BYTES)
        needed = 128 if self.heads * self.dim <= 1024 else 168  # registers of a thread
        return max(1, min(by_memory, REGISTERS // (needed * self.threads)))
