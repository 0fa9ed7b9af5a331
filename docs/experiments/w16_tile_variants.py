"""The variants of w16_tile.cu: their shared memory, their cubins."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "service" / "kernels"
HEADERS = (KERNELS / "cuda", KERNELS / "dense_linear")
SOURCE = HERE / "w16_tile.cu"
ROWS, COLUMNS, INPUTS = 128, 256, 64  # of a tile: rows of x, rows of W, and of K in a stage
PIECE = (16, 64)  # of y that a warp stores at a time
THREADS, WARPS = 384, 8


@dataclass(frozen=True, order=True)
class Variant:
    """Fields are the kernel's definitions, in capitals."""

    gated: int
    share_w: int = 1  # blocks of a cluster, one below the other
    share_x: int = 1  # and side by side
    skew: int = 0
    stages: int = 4
    bf16: int = 0

    @property
    def cluster(self) -> int:
        return self.share_w * self.share_x

    @property
    def outputs(self) -> int:
        """Columns of y in a tile."""
        return COLUMNS // 2 if self.gated else COLUMNS

    @property
    def w_box(self) -> int:
        """Rows of W that one copy brings."""
        return min(128, COLUMNS // self.share_w)

    @property
    def x_box(self) -> int:
        return ROWS // self.share_x

    @property
    def shared_bytes(self) -> int:
        """The kernel asserts the same figure."""
        rooms = WARPS * 2 * PIECE[0] * PIECE[1] * 2
        return 1024 + rooms + self.stages * (COLUMNS + ROWS) * INPUTS * 2

    @property
    def definitions(self) -> dict[str, int]:
        return {name.upper(): value for name, value in asdict(self).items()} | {
            "SHARED_BYTES": self.shared_bytes
        }

    @property
    def file(self) -> str:
        return "tile_" + "_".join(map(str, asdict(self).values())) + ".cubin"

    @property
    def label(self) -> str:
        told = f"{'gated' if self.gated else 'plain'} {self.share_w}x{self.share_x}"
        return told + f" skew {self.skew}" * (self.skew > 0) + " bf16" * self.bf16

    def compile(self, folder: Path) -> str:
        """Writes the cubin; -> the compiler's complaint, empty where there is none."""
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-Xptxas=-v"]
        command += [f"-D{name}={value}" for name, value in self.definitions.items()]
        command += [f"-I{headers}" for headers in HEADERS]
        command += ["-o", str(folder / self.file), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line.strip() for line in done.stderr.splitlines()]
        told = [line for line in lines if "error" in line or "fatal" in line or "C75" in line]
        told += [line for line in lines if "spill" in line and " 0 bytes spill stores" not in line]
        return "; ".join(told)[:300] or ("" if done.returncode == 0 else f"nvcc ended with {done.returncode}")


CLUSTERS = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
IN_FLOAT16 = tuple(
    Variant(gated, *shares, skew)
    for gated in (1, 0)
    for shares, skew in [*((shares, 0) for shares in CLUSTERS), ((2, 1), 1), ((2, 2), 1)]
)
IN_BFLOAT16 = (Variant(1, 2, bf16=1), Variant(0, 2, bf16=1))  # for their numbers alone


def all_variants() -> tuple[Variant, ...]:
    return IN_FLOAT16 + IN_BFLOAT16


def compile_all(folder: Path, workers: int) -> dict[str, str]:
    """-> the complaint about each variant that has one, by its label."""
    with ThreadPoolExecutor(workers) as pool:
        complaints = pool.map(lambda variant: variant.compile(folder), all_variants())
        told = zip(all_variants(), complaints, strict=True)
        return {variant.label: text for variant, text in told if text}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        found = compile_all(Path(scratch), 2)
        for name, complaint in found.items():
            print(name, complaint)
        print(f"{len(all_variants())} variants, {len(list(Path(scratch).iterdir()))} compiled")
        sys.exit(bool(found))
