"""The variants of production's w4_few.cu and w4_tile.cu that an experiment tries, their shared memory and their cubins."""

import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "service" / "kernels"
SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
# PER_SM: blocks that registers must leave room for; EACH: blocks of one launch on a multiprocessor
FIELDS = {
    "few": ("WARPS", "STAGES", "PER_SM", "EACH", "TILES", "WIDE_TABLE", "BF16"),
    "tile": (
        "TILE",
        "RT",
        "WGS",
        "KS",
        "STAGES",
        "PER_SM",
        "STRETCHED",
        "SCALED_SUMS",
        "EACH",
        "WIDE_TABLE",
        "BF16",
    ),
}
MAX_SHARED_BYTES = 232448


@dataclass(frozen=True, order=True)
class Kernel:
    family: str
    affine: int
    config: tuple[int, ...]

    @property
    def values(self) -> dict[str, int]:
        return dict(zip(FIELDS[self.family], self.config, strict=True))

    @property
    def source(self) -> Path:
        return KERNELS / "w4_linear" / f"w4_{self.family}.cu"

    @property
    def definitions(self) -> dict[str, int]:
        return {**self.values, "AFFINE": self.affine, "SHARED_BYTES": self.shared_bytes}

    @property
    def label(self) -> str:
        return " ".join([self.family, *(f"{k.lower()} {v}" for k, v in self.values.items())])

    @property
    def file(self) -> str:
        return "_".join([self.family, *map(str, (self.affine, *self.config))]) + ".cubin"

    @property
    def outputs(self) -> int:
        """Of a tile."""
        return 64 * self.values["RT"] * self.values["WGS"] if self.family == "tile" else 16

    @property
    def threads(self) -> int:
        v = self.values
        return v["WARPS"] * 32 if self.family == "few" else (v["WGS"] + 1) * 128

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory but for what grows with the rows; the kernels assert the same figure."""
        v, affine = self.values, self.affine
        if self.family == "few":
            ring = v["WARPS"] * v["STAGES"] * (1072 if affine else 1056)
            table = 1024 if affine else 67584 if v["WIDE_TABLE"] else 34816
            return up(table + ring, 128) - 1024
        scales = self.outputs * 5 // 2 if affine else self.outputs * v["KS"]
        stage = up(v["KS"] * v["TILE"] * 128 + self.outputs * 32 * v["KS"] + scales, 1024)
        table = up((1280 if affine else 2304) + v["WGS"] * 4 * min(v["TILE"], 16) * 32, 1024)
        return table + (0 if affine else 65536 if v["WIDE_TABLE"] else 32768) + v["STAGES"] * stage - 1024

    def shared_bytes_for(self, rows: int, k: int) -> int:
        if self.family != "few":
            return self.shared_bytes
        return self.shared_bytes + rows * (128 * self.values["WARPS"] + 2 * k + 64)

    def compile(self, folder: Path) -> str:
        """Writes the cubin; -> the compiler's complaint, empty where there is none."""
        return compile_one(self.source, folder / self.file, self.definitions)


def compile_one(source: Path, cubin: Path, defines: dict[str, int]) -> str:
    command = [
        "nvcc",
        "-cubin",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-Xptxas=-v",
        "-I",
        str(KERNELS / "cuda"),
    ]
    command += [f"-D{name}={value}" for name, value in defines.items()]
    done = subprocess.run([*command, "-o", str(cubin), str(source)], capture_output=True, text=True)
    told = [line.strip() for line in done.stderr.splitlines()]
    lines = [line for line in told if "error" in line or "C75" in line]
    lines += [line for line in told if "spill" in line and " 0 bytes spill stores" not in line]
    return "; ".join(lines)[:300] if done.returncode == 0 or lines else f"nvcc ended with {done.returncode}"


def up(value: int, step: int) -> int:
    return -(-value // step) * step


# (warps, stages, blocks of registers, blocks of a launch), with NF4's wide table the second
FEW = [(16, 3, 2, 1), (16, 3, 2, 2), (8, 4, 2, 2)]
FEW_WIDE = [(16, 3, 1, 1), (16, 2, 2, 1), (8, 4, 2, 2)]
BETWEEN = (384, 512, 576, 640, 768, 896)
# (tile, rt, wgs, ks, stages, blocks of registers, stretched, scaled sums, blocks of a launch)
MANY = [
    (256, 1, 2, 1, 4, 1, 0, 0, 1), (256, 1, 2, 1, 4, 1, 1, 0, 1), (192, 1, 2, 1, 5, 1, 0, 0, 1), (192, 1, 2, 1, 5, 1, 1, 0, 1),
    (128, 2, 2, 1, 7, 1, 0, 0, 1), (128, 2, 2, 1, 7, 1, 1, 0, 1),
]  # fmt: skip
# likewise by rows: of gate_up, whose whole tiles leave few multiprocessors idle, and of the others
WIDE = {
    1: [],
    8: [(8, 1, 4, 2, 8, 1, 1, 1, 1), (8, 2, 2, 2, 8, 1, 0, 1, 1)],
    16: [(16, 2, 2, 2, 7, 1, 0, 1, 1), (16, 1, 4, 2, 7, 1, 1, 1, 1), (16, 1, 4, 2, 7, 1, 0, 1, 1)],
    32: [(32, 2, 2, 2, 6, 1, 0, 0, 1), (32, 2, 2, 2, 5, 1, 1, 0, 1), (32, 1, 4, 2, 6, 1, 1, 0, 1)],
    64: [(64, 2, 2, 2, 5, 1, 0, 0, 1), (64, 2, 2, 2, 4, 1, 0, 0, 1), (64, 2, 2, 2, 4, 1, 1, 0, 1), (64, 1, 4, 2, 5, 1, 1, 0, 1)],
    128: [(128, 2, 2, 1, 7, 1, 1, 0, 1), (128, 2, 2, 1, 6, 1, 0, 0, 1)],
    256: [(256, 1, 2, 1, 4, 1, 1, 0, 1), (256, 1, 2, 1, 4, 1, 0, 0, 1)],
    1024: [(256, 1, 2, 1, 4, 1, 1, 0, 1)],
    **dict.fromkeys(BETWEEN, MANY),
}  # fmt: skip
NARROW = {
    1: [],
    8: [(8, 1, 4, 2, 8, 1, 0, 1, 1), (8, 1, 2, 2, 12, 1, 0, 1, 1)],
    16: [(16, 1, 4, 2, 7, 1, 0, 1, 1), (16, 1, 3, 2, 8, 1, 0, 1, 1), (16, 1, 2, 2, 10, 1, 0, 1, 1)],
    32: [(32, 1, 2, 2, 8, 1, 0, 0, 1), (32, 1, 3, 2, 7, 1, 0, 0, 1), (32, 2, 2, 2, 6, 1, 0, 0, 1), (32, 1, 4, 2, 6, 1, 0, 0, 1)],
    64: [(64, 1, 2, 2, 6, 1, 0, 0, 1), (64, 1, 3, 2, 6, 1, 0, 0, 1), (64, 2, 2, 2, 4, 1, 0, 0, 1)],
    128: [(128, 1, 2, 1, 7, 1, 0, 0, 1), (128, 1, 3, 1, 6, 1, 0, 0, 1)],
    256: [(256, 1, 2, 1, 4, 1, 0, 0, 1), (256, 1, 2, 1, 4, 1, 1, 0, 1), (128, 1, 2, 1, 7, 1, 0, 0, 1), (128, 1, 3, 1, 6, 1, 0, 0, 1)],
    1024: [(256, 1, 2, 1, 4, 1, 0, 0, 1), (256, 1, 2, 1, 4, 1, 1, 0, 1), (128, 1, 3, 1, 6, 1, 0, 0, 1)],
    **dict.fromkeys(BETWEEN, MANY),
}  # fmt: skip
ALSO_BF16 = {
    (16, 3, 2, 1),
    (16, 1, 2, 2, 5, 2, 0, 1, 1),
    (64, 2, 2, 2, 5, 1, 1, 0, 1),
    (64, 1, 2, 2, 6, 1, 0, 0, 1),
}


def kernels_for(shape: str, rows: int, affine: int) -> list[Kernel]:
    """Those that are tried at this shape and number of rows."""
    k = SHAPES[shape][1]
    kernels = [Kernel("few", affine, (*c, 1, 0, 0)) for c in FEW] if rows <= 8 else []
    kernels += [Kernel("few", 0, (*c, 1, 1, 0)) for c in FEW_WIDE] if rows <= 8 and not affine else []
    if rows == 16:
        kernels.append(Kernel("few", affine, (16, 3 if affine else 2, 1, 1, 2, 0, 0)))
    tiles = (WIDE if shape == "gate_up" else NARROW)[1 if rows < 8 else rows]
    for number, config in enumerate(tiles):
        narrow = Kernel("tile", affine, (*config, 0, 0))
        has_wide_table = not affine and rows <= 128 and narrow.values["PER_SM"] == 1
        kernels += [narrow] if number == 0 or not has_wide_table else []
        kernels += [with_wide_table(narrow)] if has_wide_table else []
    kernels += [Kernel(x.family, x.affine, (*x.config[:-1], 1)) for x in kernels if is_tried_in_bf16(x)]
    room = MAX_SHARED_BYTES + 1024  # of a multiprocessor, 1024 a block being the system's
    return [x for x in kernels if (x.shared_bytes_for(rows, k) + 1024) * x.values["EACH"] <= room]


def is_tried_in_bf16(kernel: Kernel) -> bool:
    return any(kernel.config[: len(config)] == config for config in ALSO_BF16)


def with_wide_table(kernel: Kernel) -> Kernel:
    """With as many stages as fit beside it."""
    *config, stages, per_sm, stretched, scaled_sums, each, _, bf16 = kernel.config
    for fewer in range(stages, 0, -1):
        found = Kernel("tile", kernel.affine, (*config, fewer, per_sm, stretched, scaled_sums, each, 1, bf16))
        if found.shared_bytes <= MAX_SHARED_BYTES:
            return found
    raise AssertionError(kernel)


def all_kernels(all_rows: list[int]) -> list[Kernel]:
    return sorted(
        {k for shape in SHAPES for m in all_rows for affine in (0, 1) for k in kernels_for(shape, m, affine)}
    )


def compile_all(folder: Path, all_rows: list[int], workers: int) -> dict[str, str]:
    """-> the complaint about each kernel's file that has one."""
    with ThreadPoolExecutor(workers) as pool:
        kernels = all_kernels(all_rows)
        read = pool.submit(compile_one, HERE / "w4_read.cu", folder / "read.cubin", {})
        complaints = list(pool.map(lambda kernel: kernel.compile(folder), kernels))
        found = {kernel.file: text for kernel, text in zip(kernels, complaints, strict=True) if text}
        return found | ({"read": read.result()} if read.result() else {})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        rows = [*WIDE]
        for name, complaint in compile_all(Path(scratch), rows, 2).items():
            print(name, complaint)
        print(f"{len(all_kernels(rows))} kernels, {len(list(Path(scratch).iterdir())) - 1} compiled")
