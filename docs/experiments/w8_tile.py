"""W8A8 linears (production's w8_tile.cu) at M = 1 ... 1024 on Llama-3.1-8B's four shapes: built, checked and timed in one call.

python docs/experiments/w8_tile.py --out FOLDER [--seconds 120] [--rows 1,16,64,256,1024]

LLM.int8() with outliers of each row in 0, 3, 32 and 256 columns, and FP8; float16, and two kernels in bfloat16. Checked against float64 on fresh random inputs
with poisoned outputs, also with fewer rows than the tile and (o) 700 columns, and twice for the same bits; timed in CUDA
graphs over weights rotated past the L2, with and without programmatic dependent launch. A worker process runs them: one
that dies costs that kernel, and the next goes on. Beside them torch._scaled_mm in the same run.
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from graph_times import capture, replays_us
from w8_variants import INT8, SHAPES, Kernel, all_kernels, cut, kernels_for
from workers import measure, read_lines, work

COUNTS = (32, 0, 3, 256)  # outlier columns
ROTATED_BYTES = 256 << 20
X_OUT_COLUMNS = 512
# relative, in norm, of int8 and of FP8; rounding the result is 2.1e-4 in float16, 1.7e-3 in bfloat16 as torch._scaled_mm's
LARGEST_ERROR, LARGEST_BFLOAT16_ERROR = {0: 4e-4, 1: 1e-3}, 3e-3
UINT8, SWIZZLE_128, PROMOTE_256 = 0, 3, 3  # CU_TENSOR_MAP_*


def tasks_for(all_rows: list[int]) -> list[dict[str, Any]]:
    """One for each shape, number of rows, kernel and cut of the work."""
    found = []
    for shape, (n, k) in SHAPES.items():
        for rows in all_rows:
            place = {"shape": shape, "rows": rows}
            for kernel in kernels_for(rows):
                cuts: dict[tuple[int, int], str] = {}
                for how in ("whole", "rest") if rows < 1024 else ("whole",):
                    cuts.setdefault(cut(kernel, how, n, k, rows, 132), how)
                found += [{**place, "kernel": vars(kernel), "how": how} for how in cuts.values()]
            found += [{**place, "kernel": {}, "how": how} for how in ("fast", "exact")]
    return found


class Worker:
    def __init__(self, folder: Path) -> None:
        import torch

        from service.kernels.cuda.driver import driver

        self.torch, self.folder = torch, folder
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.manual_seed(int.from_bytes(os.urandom(4)))
        self.driver = driver()
        self.multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        self.workspace = torch.full((80 << 20,), float("nan"), device="cuda")
        self.arrived = torch.zeros(1 << 16, device="cuda", dtype=torch.int32)
        self.gathered = torch.zeros(2, device="cuda", dtype=torch.int32)
        self.x_out = torch.full((1024 * X_OUT_COLUMNS,), float("nan"), device="cuda").half()
        self.place: tuple[Any, ...] = ()
        self.handles: dict[Kernel, ctypes.c_void_p] = {}
        self.images: list[bytes] = []

    def set_place(self, shape: str, rows: int) -> None:
        from w8_problem import Problem

        if self.place == (shape, rows):
            return
        n, k = SHAPES[shape]
        self.place, self.problems = (shape, rows), {}
        self.wanted: dict[tuple[int, int, int], Any] = {}
        like = None
        for count in (*COUNTS, 700) if shape == "o" else COUNTS:
            self.problems[count, 0] = like = Problem(rows, n, k, count, "cuda", like)
        self.problems[32, 1] = Problem(rows, n, k, 32, "cuda", like, bf16=1)
        number = max(2, ROTATED_BYTES // (n * k))
        assert like is not None
        self.weights = {
            0: [like.w] + [like.w.clone() for _ in range(number - 1)],
            1: [like.w8] + [like.w8.clone() for _ in range(number - 1)],
        }

    def want(self, count: int, fp8: int, bf16: int) -> Any:
        if (count, fp8, bf16) not in self.wanted:
            self.wanted[count, fp8, bf16] = self.problems[count, bf16].want(fp8)
        return self.wanted[count, fp8, bf16]

    def handle(self, kernel: Kernel) -> ctypes.c_void_p:
        from service.kernels.cuda.driver import MAX_DYNAMIC_SHARED_BYTES

        if kernel not in self.handles:
            module, handle = ctypes.c_void_p(), ctypes.c_void_p()
            self.images.append((self.folder / kernel.file).read_bytes())
            self.driver.call("cuModuleLoadData", ctypes.byref(module), self.images[-1])
            self.driver.call("cuModuleGetFunction", ctypes.byref(handle), module, b"w8_tile")
            self.driver.call("cuFuncSetAttribute", handle, MAX_DYNAMIC_SHARED_BYTES, kernel.shared_bytes)
            self.handles[kernel] = handle
        return self.handles[kernel]

    def bind(
        self, kernel: Kernel, how: str, count: int, weight: Any, y: Any, rows: int, dependent: bool
    ) -> Callable[[], None]:
        from service.kernels.cuda.driver import PROGRAMMATIC_STREAM_SERIALIZATION, Attribute, Config

        problem = self.problems[count, kernel.bf16]
        n, k = problem.n, problem.k
        blocks, stream_tiles = cut(kernel, how, n, k, rows, self.multiprocessors)
        assert kernel.workspace_bytes(blocks) <= self.workspace.nbytes
        _, x, steps = problem.operands(kernel.fp8)
        maps = [self.byte_map(x, k, rows, kernel.tile), self.byte_map(weight, k, n, kernel.outputs)]
        tensors = (
            steps,
            problem.w_steps,
            problem.x16,
            problem.bitmap,
            weight,
            y,
            self.workspace,
            self.arrived,
            self.x_out,
            self.gathered,
        )
        numbers = [ctypes.c_int(v) for v in (rows, n, k, stream_tiles, X_OUT_COLUMNS)]
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        arguments = [*maps, *addresses, *numbers, ctypes.c_float(problem.threshold)]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        attribute = Attribute(id=PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value[0] = 1
        sizes = blocks, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes
        config = Config(*sizes, None, ctypes.pointer(attribute), int(dependent))
        handle = self.handle(kernel)

        def launch() -> None:
            config.stream = self.torch.cuda.current_stream().cuda_stream
            self.driver.call("cuLaunchKernelEx", ctypes.byref(config), handle, pointers, None)

        launch.kept = (arguments, attribute)  # type: ignore[attr-defined]
        return launch

    def byte_map(self, tensor: Any, columns: int, rows: int, box_rows: int) -> Any:
        """A 2D map of bytes [rows, columns], boxes of 128 columns under the 128-byte swizzle; 64-byte aligned."""
        room = ctypes.create_string_buffer(192)
        place = (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 64)
        self.driver.call(
            "cuTensorMapEncodeTiled", ctypes.byref(place), UINT8, 2, ctypes.c_void_p(tensor.data_ptr()),
            (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns), (ctypes.c_uint32 * 2)(128, box_rows),
            (ctypes.c_uint32 * 2)(1, 1), 0, SWIZZLE_128, PROMOTE_256, 0)  # fmt: skip
        return place

    def time(self, launches: list[Callable[[], Any]]) -> float:
        """Median microseconds of a launch; one graph replays all of them in turn."""
        return statistics.median(replays_us(capture(launches * 2))) / len(launches) / 2

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        self.set_place(task["shape"], task["rows"])
        if not task["kernel"]:
            return self.run_scaled_mm(task["how"] == "fast")
        torch, rows, how, kernel = self.torch, task["rows"], task["how"], Kernel(**task["kernel"])
        counts = (32,) if kernel.fp8 or kernel.bf16 else tuple(c for c, bf16 in self.problems if not bf16)
        problem = self.problems[32, kernel.bf16]
        y = torch.empty((rows, problem.n), device="cuda", dtype=problem.dtype)
        errors, same = {}, True
        for count in counts:
            want = self.want(count, kernel.fp8, kernel.bf16)
            launch = self.bind(kernel, how, count, self.weights[kernel.fp8][-1], y, rows, False)
            y.fill_(float("nan"))
            launch()
            torch.cuda.synchronize()
            errors[count] = float((y.double() - want).norm() / want.norm())
            first = y.clone()
            for _ in range(3):
                launch()
                same &= torch.equal(first, y) or bool(first.isnan().any())
        fewer = max(1, rows - 3)
        y.fill_(float("nan"))
        self.bind(kernel, how, 32, self.weights[kernel.fp8][0], y, fewer, True)()
        torch.cuda.synchronize()
        want = self.want(32, kernel.fp8, kernel.bf16)[:fewer]
        errors[-1] = float((y[:fewer].double() - want).norm() / want.norm())
        same &= bool(y[fewer:].isnan().all())
        us = {
            f"{count}{' alone' if not dependent else ''}": self.time(
                [self.bind(kernel, how, count, w, y, rows, dependent) for w in self.weights[kernel.fp8]]
            )
            for count, dependent in [(32, False), *((c, True) for c in counts if c != 700)]
        }
        return {
            "us": us,
            "errors": errors,
            "same": same,
            "idle_counters": not bool(self.arrived.any() or self.gathered.any()),
        }

    def run_scaled_mm(self, fast: bool) -> dict[str, Any]:
        torch, problem = self.torch, self.problems[32, 0]
        x, steps, w_steps = problem.x8, problem.x8_steps[:, None], problem.w_steps[None, :]

        def product(w: Any) -> Any:
            return torch._scaled_mm(
                x, w.t(), scale_a=steps, scale_b=w_steps, out_dtype=torch.bfloat16, use_fast_accum=fast
            )

        want = self.want(32, 1, 0)
        error = float((product(self.weights[1][0]).double() - want).norm() / want.norm())
        us = self.time([partial(product, w) for w in self.weights[1]])
        return {"us": {"32": us}, "errors": {32: error}, "same": True, "idle_counters": True}


def compile_all(folder: Path, workers: int) -> dict[str, str]:
    """-> the complaint about each kernel that has one."""
    with ThreadPoolExecutor(workers) as pool:
        complaints = pool.map(lambda kernel: kernel.compile(folder), all_kernels())
        told = zip(all_kernels(), complaints, strict=True)
        return {kernel.file: complaint for kernel, complaint in told if complaint}


def name_of(task: dict[str, Any]) -> str:
    if not task["kernel"]:
        return f"torch._scaled_mm {task['how']}"
    kernel = Kernel(**task["kernel"])
    twice = " twice" if kernel.per_sm == 2 else ""
    return f"{kernel.outputs}x{kernel.tile} stages {kernel.stages}{twice} {task['how']}"


def is_right(line: dict[str, Any]) -> bool:
    kernel = line["kernel"]
    largest = LARGEST_BFLOAT16_ERROR if not kernel or kernel["bf16"] else LARGEST_ERROR[kernel["fp8"]]
    return all(e <= largest for e in line["errors"].values()) and line["same"] and line["idle_counters"]


def report(folder: Path, all_rows: list[int]) -> None:
    tasks, lines = (
        json.loads((folder / "tasks.json").read_text()),
        read_lines(folder / "results.jsonl"),
    )
    results = [{**tasks[line["task"]], "name": name_of(tasks[line["task"]]), **line} for line in lines]
    (folder / "w8_tile.json").write_text(json.dumps(results, indent=1))
    complaints: dict[str, list[str]] = {}
    for r in results:
        if "failed" in r:
            complaints.setdefault(f"{r['name']}: {r['failed'][:100]}", []).append(
                f"{r['shape']} M={r['rows']}"
            )
        elif not is_right(r):
            told = ", ".join(f"{count}: {error:.1e}" for count, error in r["errors"].items())
            where = f"{r['shape']} M={r['rows']} same bits {r['same']} idle {r['idle_counters']}"
            complaints.setdefault(f"WRONG {r['name']}", []).append(f"{where} {told}")
    for what, places in complaints.items():
        print(f"{what}: {len(places)} times, first {places[0]}")
    fine = [r for r in results if "us" in r and is_right(r)]
    for kind, want in (
        ("int8", {"fp8": 0, "bf16": 0}),
        ("int8 bf16", {"fp8": 0, "bf16": 1}),
        ("fp8", {"fp8": 1, "bf16": 0}),
    ):
        errors = [e for r in fine if want.items() <= r["kernel"].items() for e in r["errors"].values()]
        print(f"{kind}: {len(errors)} results checked, largest error {max(errors, default=float('nan')):.1e}")
    kinds = [("int8", {"fp8": 0, "bf16": 0}, key) for key in ("32", "32 alone", "0", "3", "256")]
    kinds += [("int8 bf16", {"fp8": 0, "bf16": 1}, "32")]
    kinds += [("fp8", {"fp8": 1}, "32"), ("fp8", {"fp8": 1}, "32 alone"), ("_scaled_mm", {}, "32")]
    print(
        f"{'M':5s} {'kind':11s} {'columns':9s}"
        + "".join(f"{s:>9s}" for s in SHAPES)
        + "    layer, us; best variants"
    )
    for rows in all_rows:
        for kind, want, key in kinds:
            best: dict[str, tuple[float, str]] = {}
            for r in fine:
                mine = (
                    want.items() <= r["kernel"].items()
                    and bool(want) == bool(r["kernel"])
                    and r["rows"] == rows
                )
                if mine and key in r["us"]:
                    best[r["shape"]] = min(best.get(r["shape"], (1e9, "")), (r["us"][key], r["name"]))
            cells = "".join(f"{best.get(s, (float('nan'), ''))[0]:9.1f}" for s in SHAPES)
            if not best:
                continue
            total = sum(us for us, _ in best.values()) if len(best) == len(SHAPES) else float("nan")
            names = "; ".join(best[s][1] for s in SHAPES if s in best) if key == "32" else ""
            print(f"{rows:<5d} {kind:11s} {key:9s}{cells} {total:9.1f}  {names}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for cubins, results.jsonl, w8_tile.json"
    )
    parser.add_argument("--seconds", type=float, default=120, help="after which nothing is measured")
    parser.add_argument("--rows", default=",".join(map(str, INT8)))
    parser.add_argument("--work", action="store_true", help="internal: run the tasks that have no result")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if arguments.work:
        work(folder, Worker(folder).run)
        return
    all_rows = [int(rows) for rows in arguments.rows.split(",")]
    measure(
        Path(__file__),
        folder,
        tasks_for(all_rows),
        compile_all,
        arguments.seconds,
        lambda task: task["kernel"],
    )
    report(folder, all_rows)


if __name__ == "__main__":
    main()
