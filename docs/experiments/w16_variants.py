"""The variants of production's dense_stream.cu that the experiment tries: their shared memory, their cubins."""

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "service" / "kernels"
SOURCE = KERNELS / "dense_linear" / "dense_stream.cu"
FIELDS = ("TILE", "RT", "WGS", "KS", "STAGES", "SHARE", "PER_SM", "AHEAD", "EARLY", "BF16")


@dataclass(frozen=True, order=True)
class Variant:
    """The definitions of dense_stream.cu, in the order of FIELDS."""

    tile: int
    rt: int
    wgs: int
    ks: int
    stages: int
    share: int = 1
    per_sm: int = 1
    ahead: int = 0
    early: int = 0
    bf16: int = 0

    @property
    def outputs(self) -> int:
        return 64 * self.rt * self.wgs

    @property
    def threads(self) -> int:
        return self.wgs * 128 + (128 if self.rt * self.tile >= 128 else 32)

    @property
    def shared_bytes(self) -> int:
        """The kernel asserts the same figure."""
        ring = -(-(512 + self.wgs * 4 * 256) // 1024) * 1024
        return ring + self.stages * self.ks * (self.outputs + self.tile) * 128

    @property
    def definitions(self) -> dict[str, int]:
        return {**dict(zip(FIELDS, astuple(self), strict=True)), "SHARED_BYTES": self.shared_bytes}

    @property
    def file(self) -> str:
        return "_".join(map(str, astuple(self))) + ".cubin"

    @property
    def label(self) -> str:
        told = f"t{self.tile} {self.outputs} outputs ({self.wgs}x{self.rt}) ks {self.ks} stages {self.stages}"
        told += f" {self.shared_bytes >> 10} KiB"
        told += " pairs" * (self.share == 2) + " 2 an SM" * (self.per_sm == 2)
        return told + f" ahead {self.ahead}" * (self.ahead > 0) + " early" * self.early + " bf16" * self.bf16

    def compile(self, folder: Path) -> str:
        """Writes the cubin; -> the compiler's complaint, empty where there is none."""
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
        command += [f"-D{name}={value}" for name, value in self.definitions.items()]
        command += ["-I", str(KERNELS / "cuda"), "-o", str(folder / self.file), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        lines = [line.strip() for line in done.stderr.splitlines()]
        told = [line for line in lines if "error" in line or "C75" in line]
        told += [line for line in lines if "spill" in line and " 0 bytes spill stores" not in line]
        return "; ".join(told)[:300] or ("" if done.returncode == 0 else f"nvcc ended with {done.returncode}")


# Shared memory of up to 112 KiB leaves room for a block of the next launch, which then fetches its first stages
# beside this one; more than that does not, and hides more latency within a launch.
VARIANTS = {
    8: (
        Variant(8, 1, 1, 4, 3), Variant(8, 1, 1, 4, 3, early=1), Variant(8, 1, 1, 2, 6), Variant(8, 1, 2, 2, 3),
        Variant(8, 1, 1, 4, 6), Variant(8, 1, 2, 2, 6),
    ),
    16: (
        Variant(16, 1, 1, 2, 5), Variant(16, 1, 1, 2, 5, early=1), Variant(16, 1, 2, 2, 3), Variant(16, 1, 1, 4, 5),
        Variant(16, 1, 2, 2, 6),
    ),
    32: (
        Variant(32, 1, 1, 2, 4), Variant(32, 1, 1, 2, 4, early=1), Variant(32, 1, 2, 2, 5), Variant(32, 1, 1, 2, 8),
    ),
    64: (
        Variant(64, 1, 1, 2, 3), Variant(64, 1, 1, 2, 3, early=1), Variant(64, 1, 1, 1, 6), Variant(64, 1, 1, 2, 6),
        Variant(64, 1, 2, 2, 4), Variant(64, 1, 2, 1, 9), Variant(64, 1, 2, 1, 9, share=2),
    ),
    128: (Variant(128, 1, 2, 1, 6),),
}  # fmt: skip
TILES = {1: 8, 16: 16, 32: 32, 64: 64, 128: 128}  # by rows
IN_BFLOAT16 = (Variant(8, 1, 1, 4, 3, bf16=1), Variant(64, 1, 2, 1, 4, bf16=1))  # for their numbers alone


def variants_for(rows: int) -> list[Variant]:
    return list(VARIANTS[TILES[rows]])


def all_variants() -> list[Variant]:
    return [*IN_BFLOAT16, *(variant for found in VARIANTS.values() for variant in found)]


def compile_all(folder: Path, workers: int) -> dict[str, str]:
    """-> the complaint about each variant that has one, by its file's name. Beside them, read.cubin: w4_read.cu."""
    subprocess.run(
        ["nvcc", "-cubin", "-arch=sm_90", "-o", folder / "read.cubin", HERE / "w4_read.cu"], check=True
    )
    with ThreadPoolExecutor(workers) as pool:
        complaints = pool.map(lambda variant: variant.compile(folder), all_variants())
        told = zip(all_variants(), complaints, strict=True)
        return {variant.file: text for variant, text in told if text}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, complaint in compile_all(Path(scratch), 2).items():
            print(name, complaint)
        print(f"{len(all_variants())} variants, {len(list(Path(scratch).iterdir()))} compiled")
