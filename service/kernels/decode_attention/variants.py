"""The kernel's compile-time variants: what the host must know of each to compile and launch it.

table.py --Variant--> cuda.py; `decode_attention.cu` asserts the same shared memory
"""

from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from service.kernels.cuda import Program

FOLDER = Path(__file__).parent
PAGE_TOKENS = 16
BOX_DIMS = 64  # of a head, that one copy brings
SHARED_BYTES, SYSTEM_BYTES = 228 << 10, 1 << 10  # of a multiprocessor; of each block's, not its own
REGISTERS, MOST_REGISTERS = 64 << 10, 255  # of a multiprocessor, of a thread
PORTABLE_SPLITS = 8  # a cluster of more blocks has to be allowed


def rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


@dataclass(frozen=True)
class Variant:
    """Fields are the kernel's definitions, in capitals."""

    dim: int
    group: int  # query heads of a KV head
    bf16: int  # activations and pages are bfloat16, not float16
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
    def stage_bytes(self) -> int:
        """A page of K and of V."""
        return 2 * PAGE_TOKENS * 2 * rounded_up(self.dim, BOX_DIMS)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same."""
        barriers = rounded_up(8 * (self.warps * self.stages + 1), 16)
        queries = barriers + self.heads * (2 * self.dim + 16)
        states = rounded_up(queries + 4 * self.dim + self.warps * self.heads * 8, 16)
        parts = 0
        if self.splits > 1:
            parts = self.splits * 16 * (-(-self.group * self.dim // 4 // self.splits) + self.heads)
        return rounded_up(states + parts, 1024) + self.warps * self.stages * self.stage_bytes

    @property
    def per_sm(self) -> int:
        """Blocks for which shared memory and, at 128 registers a thread, registers leave room."""
        by_memory = SHARED_BYTES // (self.shared_bytes + SYSTEM_BYTES)
        return max(1, min(by_memory, REGISTERS // (128 * self.threads)))
