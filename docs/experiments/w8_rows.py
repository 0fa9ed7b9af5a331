"""Rows quantized where they are made (w8_rows.cu): built, checked against torch and timed for M = 1 ... 1024.

python docs/experiments/w8_rows.py --out FOLDER       # on a GPU
python docs/experiments/w8_rows.py --emulate          # on a CPU, a few rows

Norm is 4,096 columns wide, silu 14,336. Timed in CUDA graphs over inputs rotated past the L2, with dependent launches.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from graph_times import capture, replays_us
from torch import Tensor
from w8_problem import THRESHOLD, bits

from service.kernels.cuda import Program
from service.kernels.cuda.cubins import SHARED_HEADERS
from tests.kernels.emulated import build

SOURCE = Path(__file__).with_suffix(".cu")
EPS = 1e-5
ROTATED_BYTES = 192 << 20
# (silu, threads, chunks of 8 columns a thread)
KERNELS = ((0, 512, 1), (0, 256, 2), (1, 448, 4), (1, 896, 2))
RUN = """void run(int rows, const uint16_t* first, const uint16_t* delta, const uint16_t* gain, const int* live,
    uint16_t* total, uint16_t* x16, char* codes, float* steps, uint32_t* bitmap, uint32_t* spent, int spent_words, int width,
    float eps, float threshold) {
    emulate(rows, 1, ROW_THREADS, [=] { w8_rows(first, delta, gain, live, total, x16, codes, steps, bitmap, spent, spent_words, width,
        eps, threshold); }); }"""


@dataclass
class Rows:
    """Inputs and poisoned outputs of one launch; the last row is padding."""

    silu: int
    rows: int
    width: int
    device: str

    def __post_init__(self) -> None:
        rows, width, device = self.rows, self.width, self.device
        self.first = torch.randn(rows, width * (1 + self.silu), device=device).half()
        self.delta = torch.randn(rows, width, device=device).half()
        self.gain = (torch.rand(width, device=device) + 0.5).half()
        self.gain[torch.randperm(width, device=device)[:16]] = 4
        if self.silu:
            self.first[:, torch.randperm(width, device=device)[:16]] += 3
        self.live = torch.tensor([max(1, rows - 1)], device=device, dtype=torch.int32)
        self.total, self.x16 = (
            torch.full((rows, width), float("nan"), device=device).half() for _ in range(2)
        )
        self.codes = torch.full((rows, width), 77, device=device, dtype=torch.int8)
        self.steps = torch.full((rows,), float("nan"), device=device)
        self.bitmap = torch.zeros(width // 32, device=device, dtype=torch.int32)
        self.spent = torch.full((width // 32,), -1, device=device, dtype=torch.int32)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.first, self.delta, self.gain, self.live, self.total, self.x16, self.codes, self.steps,
                self.bitmap, self.spent)  # fmt: skip

    def numbers(self) -> tuple[Any, ...]:
        return (
            ctypes.c_int(self.width // 32),
            ctypes.c_int(self.width),
            ctypes.c_float(EPS),
            ctypes.c_float(THRESHOLD),
        )

    def faults(self) -> str:
        """x16 within a rounding of torch's; all that follows from it exactly."""
        found, live = [], int(self.live)
        if self.silu:
            gate, up = self.first.float().chunk(2, 1)
            want = gate / (1 + (-gate).exp()) * up
        else:
            total = (self.first.float() + self.delta.float()).half()
            found += [] if torch.equal(total, self.total) else ["total"]
            wide = total.float()
            normed = (wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + EPS)).half()
            want = normed.float() * self.gain.float()
        if not ((self.x16.float() - want).abs() <= 2e-3 * want.abs() + 1e-6).all():
            found.append("x16")
        x = self.x16.float()
        outlier = x.abs() >= THRESHOLD
        outlier[live:] = False
        x = torch.where(outlier, 0, x)
        x[live:] = 0
        most = x.abs().amax(1)
        found += [] if torch.allclose(self.steps, most / 127, rtol=1e-6) else ["steps"]
        factor = torch.where(most > 0, 127 / most, 0)
        different = (self.codes != (x * factor[:, None]).round().to(torch.int8)).sum()
        found += [f"{int(different)} codes"] if different > x.numel() * 1e-6 else []
        found += [] if torch.equal(self.bitmap, bits(outlier.any(0))) else ["bitmap"]
        found += ["spent"] if self.spent.any() else []
        return ", ".join(found)


def emulate() -> bool:
    fine = True
    for silu, threads, chunks in KERNELS:
        with tempfile.TemporaryDirectory() as folder:
            definitions = (("SILU", silu), ("ROW_THREADS", threads), ("ROW_CHUNKS", chunks))
            kernel = build(Program(SOURCE, "w8_rows", definitions), Path(folder), RUN)
        for rows in (1, 3):
            problem = Rows(silu, rows, threads * chunks * 8 - 64, "cpu")
            addresses = [ctypes.c_void_p(t.data_ptr()) for t in problem.tensors()]
            kernel.run(rows, *addresses, *problem.numbers())
            faults = problem.faults()
            fine &= not faults
            print(
                f"{'silu' if silu else 'norm'} {threads} x {chunks}, {rows} rows: {faults or 'right'}",
                flush=True,
            )
    return fine


def time(launches: list[Callable[[], None]]) -> float:
    """Median microseconds of a launch; one graph replays all of them in turn."""
    return statistics.median(replays_us(capture(launches), 12)) / len(launches)


def measure(folder: Path) -> bool:
    from service.kernels.cuda.driver import PROGRAMMATIC_STREAM_SERIALIZATION, Attribute, Config, driver

    torch.zeros(1, device="cuda")
    told, images, fine = [], [], True
    for silu, threads, chunks in KERNELS:
        file = folder / f"w8_rows_{silu}_{threads}"
        flags = [
            f"-DSILU={silu}",
            f"-DROW_THREADS={threads}",
            f"-DROW_CHUNKS={chunks}",
            f"-I{SHARED_HEADERS}",
        ]
        subprocess.run(["nvcc", "-cubin", "-arch=sm_90a", "-std=c++17", "-O3", *flags, "-o", str(file),
                        str(SOURCE)], check=True)  # fmt: skip
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        images.append(file.read_bytes())
        driver().call("cuModuleLoadData", ctypes.byref(module), images[-1])
        driver().call("cuModuleGetFunction", ctypes.byref(handle), module, b"w8_rows")

        def bind(problem: Rows, handle: Any = handle, threads: int = threads) -> Callable[[], None]:
            addresses = [ctypes.c_void_p(t.data_ptr()) for t in problem.tensors()]
            arguments = [*addresses, *problem.numbers()]
            pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
            attribute = Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION)
            attribute.value[0] = 1
            config = Config(
                problem.rows, 1, 1, threads, 1, 1, 2 * threads // 8, None, ctypes.pointer(attribute), 1
            )

            def launch() -> None:
                config.stream = torch.cuda.current_stream().cuda_stream
                driver().call("cuLaunchKernelEx", ctypes.byref(config), handle, pointers, None)

            launch.kept = (arguments, attribute, problem)  # type: ignore[attr-defined]
            return launch

        width = threads * chunks * 8
        for rows in (1, 16, 64, 256, 1024):
            size = rows * width * (9 if not silu else 7)
            count = min(32, max(2, ROTATED_BYTES // size))
            launches = [bind(Rows(silu, rows, width, "cuda")) for _ in range(count)]
            launches[0]()
            torch.cuda.synchronize()
            faults = launches[0].kept[2].faults()  # type: ignore[attr-defined]
            fine &= not faults
            name = f"{'silu' if silu else 'norm'} {threads} x {chunks}"
            told.append(
                f"M={rows:5d} {time(launches):8.2f} us  {name} {'WRONG: ' + faults if faults else ''}"
            )
    print("\n".join(told))
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()), help="folder for cubins")
    parser.add_argument("--emulate", action="store_true", help="run on this CPU instead")
    arguments = parser.parse_args()
    torch.manual_seed(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if (emulate() if arguments.emulate else measure(arguments.out)) else 1)


if __name__ == "__main__":
    main()
