"""The variants of w4_few.cu, w4_tile.cu and w4_whole.cu that an experiment tries, their shared memory and their cubins."""

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
FIELDS = {
    "few": ("CLUSTER", "KWARPS", "RBLOCKS", "CHUNKS", "NT", "STAGES"),
    "tile": ("TILE", "RT", "WGS", "KS", "SPLIT", "SHARE", "STAGES", "PERMUTED"),
    "whole": (),
}


@dataclass(frozen=True, order=True)
class Kernel:
    family: str
    affine: int
    config: tuple[int, ...] = ()

    @property
    def values(self) -> dict[str, int]:
        return dict(zip(FIELDS[self.family], self.config, strict=True))

    @property
    def label(self) -> str:
        return " ".join([self.family, *(f"{k.lower()} {v}" for k, v in self.values.items())])

    @property
    def file(self) -> str:
        return "_".join([self.family, *map(str, (self.affine, *self.config))]) + ".cubin"

    @property
    def cluster(self) -> int:
        v = self.values
        return (
            v["CLUSTER"] if self.family == "few" else v["SPLIT"] * v["SHARE"] if self.family == "tile" else 1
        )

    @property
    def threads(self) -> int:
        v = self.values
        if self.family == "few":
            return v["KWARPS"] * v["RBLOCKS"] * 32
        return (v["WGS"] + 1) * 128 if self.family == "tile" else 512

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory; the kernels assert the same figure."""
        v, affine = self.values, self.affine
        if self.family == "whole":
            return (2048 + 16 * 2048 if affine else 65536 + 32768) - 1024
        if self.family == "few":
            warps = v["KWARPS"] * v["RBLOCKS"]
            owned = -(-v["RBLOCKS"] * 8 * v["NT"] // v["CLUSTER"])
            ring = up(warps * v["STAGES"] * (1088 if affine else 1136), 128)
            sums = warps * max(2 * (8 * v["NT"] * 20 + 16) * 4, v["NT"] * 1024)
            free = 1024 + up(2 * v["CLUSTER"] * owned * 64, 128)
            if affine:
                return free + ring + sums - 1024
            return 131072 + (sums if free + ring <= 65536 else ring) - 1024
        outputs = 64 * v["RT"] * v["WGS"]
        scales = outputs * 5 // 2 if affine else outputs * v["KS"]
        stage = up(v["KS"] * v["TILE"] * 128 + outputs * 32 * v["KS"] + scales, 1024)
        ring = up(2304 + v["WGS"] * 4 * min(v["TILE"], 64) * 32, 1024) if affine else 65536
        return ring + v["STAGES"] * stage - 1024

    def compile(self, folder: Path) -> str:
        """Writes the cubin; -> the compiler's complaint, empty where there is none."""
        defines = {**self.values, "AFFINE": self.affine, "SHARED_BYTES": self.shared_bytes}
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        command += ["-o", str(folder / self.file), str(HERE / f"w4_{self.family}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if "error" in line or "C75" in line]
        lines += [
            line.strip()
            for line in done.stderr.splitlines()
            if "spill" in line and " 0 bytes spill stores" not in line
        ]
        return (
            "; ".join(lines)[:300] if done.returncode == 0 or lines else f"nvcc ended with {done.returncode}"
        )


def up(value: int, step: int) -> int:
    return -(-value // step) * step


# (cluster, kwarps, rblocks, chunks, nt, stages)
FEW_4096 = {
    1: [(1, 16, 1, 2, 1, 3), (1, 16, 1, 2, 1, 4), (1, 8, 2, 4, 1, 3), (1, 8, 2, 4, 1, 4), (2, 8, 2, 2, 1, 4), (4, 4, 4, 2, 1, 4)],
    2: [(1, 16, 1, 2, 2, 3), (1, 16, 1, 2, 2, 4), (2, 8, 2, 2, 2, 3), (2, 8, 2, 2, 2, 4), (4, 4, 4, 2, 2, 3), (4, 4, 4, 2, 2, 4)],
    4: [(4, 8, 2, 1, 4, 3), (2, 16, 1, 1, 4, 3)],
}  # fmt: skip
FEW_14336 = {
    1: [(2, 14, 1, 4, 1, 3), (2, 14, 1, 4, 1, 4), (4, 14, 1, 2, 1, 4), (4, 7, 2, 4, 1, 4), (8, 7, 2, 2, 1, 4)],
    2: [(4, 14, 1, 2, 2, 3), (4, 14, 1, 2, 2, 4), (8, 7, 2, 2, 2, 3), (8, 7, 2, 2, 2, 4)],
    4: [(8, 14, 1, 1, 4, 3)],
}  # fmt: skip
# (tile, rt, wgs, ks, split, share, stages) by rows, then shape
TILES = {
    16: {
        "gate_up": [(16, 2, 2, 2, 1, 1, 6)],
    },
    32: {
        "qkv": [(32, 1, 3, 2, 4, 1, 5)],
        "o": [(32, 1, 2, 2, 4, 1, 6)],
        "gate_up": [(32, 2, 2, 2, 1, 1, 5)],
        "down": [(32, 1, 2, 2, 4, 1, 6)],
    },
    64: {
        "qkv": [(64, 1, 3, 2, 4, 1, 4), (64, 2, 2, 2, 4, 1, 4), (64, 1, 2, 2, 2, 1, 5), (64, 1, 3, 2, 4, 2, 4)],
        "o": [(64, 2, 2, 2, 8, 1, 4), (64, 1, 2, 2, 4, 1, 5), (64, 1, 2, 2, 4, 2, 5)],
        "gate_up": [(64, 2, 2, 2, 1, 1, 4), (64, 2, 2, 2, 1, 2, 4), (64, 2, 2, 1, 1, 2, 8), (64, 1, 2, 2, 1, 2, 5)],
        "down": [(64, 2, 2, 2, 8, 1, 4), (64, 1, 2, 2, 4, 1, 5), (64, 1, 2, 2, 4, 2, 5)],
    },
    128: {
        "qkv": [(128, 1, 3, 1, 4, 1, 6), (128, 1, 3, 1, 4, 2, 6)],
        "o": [(128, 2, 2, 1, 8, 1, 6), (128, 1, 2, 1, 4, 1, 6)],
        "gate_up": [(128, 2, 2, 1, 1, 1, 6), (128, 2, 2, 1, 1, 2, 6)],
        "down": [(128, 2, 2, 1, 8, 1, 6), (128, 1, 2, 1, 4, 1, 6), (128, 1, 2, 1, 4, 2, 6)],
    },
    256: {
        "qkv": [(128, 1, 3, 1, 2, 1, 6), (128, 1, 3, 1, 2, 2, 6), (128, 1, 2, 1, 1, 1, 6)],
        "o": [(128, 1, 2, 1, 2, 1, 6), (128, 1, 2, 1, 2, 2, 6), (128, 2, 2, 1, 4, 1, 6)],
        "gate_up": [(128, 2, 2, 1, 1, 1, 6), (128, 2, 2, 1, 1, 2, 6), (256, 1, 2, 1, 1, 1, 4), (256, 1, 2, 1, 1, 2, 4),
                    (64, 1, 2, 2, 1, 4, 6)],
        "down": [(128, 1, 2, 1, 2, 1, 6), (128, 1, 2, 1, 2, 2, 6), (128, 2, 2, 1, 4, 1, 6)],
    },
    1024: {
        "qkv": [(128, 1, 3, 1, 1, 1, 6), (128, 1, 3, 1, 1, 2, 6), (128, 2, 2, 1, 1, 2, 6)],
        "o": [(128, 2, 2, 1, 1, 1, 6), (128, 2, 2, 1, 1, 2, 6), (256, 1, 2, 1, 1, 2, 4)],
        "gate_up": [(128, 2, 2, 1, 1, 1, 6), (128, 2, 2, 1, 1, 2, 6), (256, 1, 2, 1, 1, 1, 4), (256, 1, 2, 1, 1, 2, 4)],
        "down": [(128, 2, 2, 1, 1, 1, 6), (128, 2, 2, 1, 1, 2, 6), (256, 1, 2, 1, 1, 2, 4)],
    },
}  # fmt: skip


def kernels_for(shape: str, rows: int, affine: int) -> list[Kernel]:
    """Of the own kernels, those that are tried at this shape and number of rows."""
    found: list[Kernel] = []
    if rows <= 32:
        few = FEW_4096 if SHAPES[shape][1] == 4096 else FEW_14336
        found += [Kernel("few", affine, config) for config in few[1 if rows <= 8 else 2 if rows <= 16 else 4]]
    permuted = (0,) if affine or rows < 64 else (0, 2)
    for config in TILES.get(rows, {}).get(shape, ()):
        found += [Kernel("tile", affine, (*config, words)) for words in permuted]
    return found


def all_kernels() -> list[Kernel]:
    rows = (1, 8, 16, 32, 64, 128, 256, 1024)
    own = {k for shape in SHAPES for m in rows for affine in (0, 1) for k in kernels_for(shape, m, affine)}
    return [*sorted(own), Kernel("whole", 0), Kernel("whole", 1)]


def compile_all(folder: Path, workers: int) -> dict[str, str]:
    """-> the complaint about each kernel's file that has one."""
    with ThreadPoolExecutor(workers) as pool:
        kernels = all_kernels()
        complaints = pool.map(lambda kernel: kernel.compile(folder), kernels)
        return {kernel.file: text for kernel, text in zip(kernels, complaints, strict=True) if text}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, complaint in compile_all(Path(scratch), 2).items():
            print(name, complaint)
        print(f"{len(all_kernels())} kernels, {len(list(Path(scratch).iterdir()))} compiled")
