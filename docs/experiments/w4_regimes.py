"""W4 linears at M = 1 ... 1024 on Llama-3.1-8B's four shapes: every variant built, checked and timed in one call.

python docs/experiments/w4_regimes.py --out FOLDER [--seconds 200] [--rows 1,16,64,256,1024]

Own kernels (w4_few.cu, w4_tile.cu), dequantize into a workspace + cuBLAS, Triton (w4_triton.py), cuBLAS on float16
weights, and a kernel that only reads the same bytes. Checked against float64 on fresh random inputs with poisoned
outputs, also with fewer rows than the tile, and twice for the same bits; timed in CUDA graphs with weights rotated
past the L2. A worker process runs them: one that dies or hangs costs that variant, and the next worker goes on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from w4_variants import SHAPES, Kernel, compile_all, kernels_for

ROWS = (1, 8, 16, 32, 64, 128, 256, 1024)
ROTATED_BYTES = 192 << 20
LARGEST_ERROR = 6e-4  # relative, in norm; cuBLAS on dequantized float16 weights has 2.9e-4
SILENT_SECONDS = 25  # of a worker, before it counts as hung
# (rows of x at a time, warps, stages)
TRITON = {
    16: ((16, 4, 4),),
    64: ((64, 4, 4), (64, 8, 4)),
    256: ((128, 8, 3), (256, 8, 3)),
    1024: ((128, 8, 3), (256, 8, 3)),
}
WHOLE_BYTES = (0, 32 << 20, 12 << 20)  # of the workspace for dequantized weights; 0: all of them at once


def list_tasks(all_rows: list[int]) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = []
    for shape in SHAPES:
        common: dict[str, Any] = {"shape": shape, "affine": 0, "config": ()}
        reads = [(affine, blocks) for affine in (0, 1) for blocks in (1, 2, 4)]
        tasks += [
            {**common, "kind": "read", "affine": affine, "rows": 0, "config": (blocks,)}
            for affine, blocks in reads
        ]
        for rows in all_rows:
            for affine in (0, 1):
                here = {**common, "rows": rows, "affine": affine}
                for kernel in kernels_for(shape, rows, affine):
                    tasks.append({**here, "kind": kernel.family, "config": kernel.config})
                for config in TRITON.get(rows, ()):
                    tasks.append({**here, "kind": "triton", "config": config})
                if rows >= 256:
                    tasks += [{**here, "kind": "whole", "config": (limit,)} for limit in WHOLE_BYTES]
            tasks.append({**common, "kind": "cublas", "rows": rows})
    return tasks


def name_of(task: dict[str, Any]) -> str:
    kind, config = task["kind"], tuple(task["config"])
    if kind in ("few", "tile"):
        return " ".join([kind, ",".join(map(str, config))])
    if kind == "whole":
        return f"dequantize {config[0] >> 20 or 'all'} MiB at a time + cuBLAS"
    return {"read": "only reads", "cublas": "cuBLAS float16", "triton": "triton {}"}[kind].format(config)


class Worker:
    """One shape's operands at a time; every task writes a line to the results."""

    def __init__(self, folder: Path) -> None:
        import torch
        from w4_driver import Driver, Function

        self.torch, self.folder = torch, folder
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        torch.manual_seed(int.from_bytes(os.urandom(4)))
        self.driver = Driver()
        self.functions: dict[Kernel, Any] = {}
        self.reader = Function(self.driver, folder / Kernel("whole", 1).file, "read_only", 512, 0, 1)
        self.arena = torch.randint(0, 1 << 31, (ROTATED_BYTES // 8 + (16 << 20),), device="cuda")
        self.shape = ""

    def function(self, kernel: Kernel) -> Any:
        from w4_driver import load

        if kernel not in self.functions:
            self.functions[kernel] = load(self.driver, kernel, self.folder)
        return self.functions[kernel]

    def set_shape(self, shape: str) -> None:
        from w4_problem import Problem

        torch, (n, k) = self.torch, SHAPES[shape]
        self.shape, self.copied, self.float16 = shape, {}, []
        self.want: dict[int, Any] = {}
        torch.cuda.empty_cache()
        outs = (4096, 1024, 1024) if shape == "qkv" else (n // 2, n // 2) if shape == "gate_up" else (n,)
        self.problem = Problem(n, k, "cuda", parts=outs)
        self.x = torch.randn(1024, k, device="cuda").half()
        self.copies = max(2, ROTATED_BYTES // (n * k // 2))

    def operands(self, affine: int) -> list[tuple[Any, ...]]:
        if affine not in self.copied:
            first = self.problem.affine if affine else self.problem.nf4
            self.copied[affine] = [first] + [tuple(t.clone() for t in first) for _ in range(self.copies - 1)]
            dense = self.problem.dense(affine).double()
            self.want[affine] = self.x.double() @ dense.t()
            if affine == 0 and not self.float16:
                half = dense.half()
                number = max(2, ROTATED_BYTES // (half.numel() * 2))
                self.float16 = [half.clone() for _ in range(number)]
        return self.copied[affine]

    def bytes_of(self, affine: int) -> int:
        """What one launch must read of the weights, as production holds them."""
        codes, scales, zeros, nested = self.problem.affine if affine else self.problem.nf4
        rest = scales.nbytes + (zeros.nbytes if affine else nested.nbytes)
        return int(codes.nbytes + rest)

    def time(self, launches: list[Callable[[], Any]]) -> tuple[float, float]:
        """Median microseconds of a launch and the sample's range; one graph replays all launches in turn."""
        torch = self.torch
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for launch in launches:
                launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for launch in launches:
                launch()
        times = []
        for i in range(14):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times.append(start.elapsed_time(end) * 1e3 / len(launches))
        return statistics.median(times), max(times) - min(times)

    def error(self, y: Any, rows: int, affine: int) -> float:
        want = self.want[affine][:rows]
        return float((y[:rows].double() - want).norm() / want.norm())

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        if task["shape"] != self.shape:
            self.set_shape(task["shape"])
        affine, rows = task["affine"], task["rows"]
        operands = self.operands(affine)
        extra: dict[str, Any] = {}
        if task["kind"] == "read":
            return self.run_read(self.bytes_of(affine), task["config"][0])
        y = self.torch.full((rows, self.problem.n), float("nan"), device="cuda", dtype=self.torch.float16)
        if task["kind"] == "cublas":
            x = self.x[:rows]
            launches: list[Callable[[], Any]] = [
                lambda w=w: self.torch.mm(x, w.t(), out=y) for w in self.float16
            ]
        elif task["kind"] == "whole":
            launches = self.whole(task["config"][0], affine, rows, y)
        elif task["kind"] == "triton":
            from w4_triton import linear

            config = task["config"]
            launches = [
                lambda o=o: linear(self.x[:rows], self.problem, o, affine, y, *config) for o in operands
            ]
        else:
            kernel = Kernel(task["kind"], affine, tuple(task["config"]))
            launches, extra = self.own(kernel, operands, rows, y)
        launches[0]()
        self.torch.cuda.synchronize()
        error = self.error(y, rows, affine)
        first = y.clone()
        launches[0]()
        self.torch.cuda.synchronize()
        us, spread = self.time(launches)
        same = bool(self.torch.equal(first, y)) or bool(first.isnan().any())
        return {"us": us, "spread": spread, "error": error, "same_bits": same, **extra}

    def own(
        self, kernel: Kernel, operands: list[Any], rows: int, y: Any
    ) -> tuple[list[Callable[[], Any]], dict[str, Any]]:
        from w4_driver import LOCAL_BYTES, NUM_REGISTERS, bind

        function = self.function(kernel)
        launches = [bind(function, kernel, self.problem, o, self.x, y, rows) for o in operands]
        extra = {
            "registers": function.attribute(NUM_REGISTERS),
            "local": function.attribute(LOCAL_BYTES),
            "clusters": function.resident_clusters(),
        }
        fewer = max(1, rows - 3)
        y.fill_(float("nan"))
        bind(function, kernel, self.problem, operands[-1], self.x, y, fewer)()
        self.torch.cuda.synchronize()
        extra["ragged_error"] = self.error(y, fewer, kernel.affine)
        extra["outside_untouched"] = bool(y[fewer:].isnan().all())
        y.fill_(float("nan"))
        return launches, extra

    def run_read(self, size: int, blocks: int) -> dict[str, Any]:
        import ctypes

        size = size // 64 * 64
        out = self.torch.zeros(1, device="cuda", dtype=self.torch.int32)
        step = -(-size // 4096) * 4096
        places = range(0, max(ROTATED_BYTES, 2 * step) - step + 1, step)
        places = [p for p in places if p + size <= self.arena.nbytes]
        launches = []
        for at in places:
            arguments = [
                ctypes.c_void_p(self.arena.data_ptr() + at),
                ctypes.c_void_p(out.data_ptr()),
                ctypes.c_uint64(size),
            ]
            launches.append(self.reader.bind(blocks * 132, arguments))
        us, spread = self.time(launches)
        return {"us": us, "spread": spread, "error": 0.0, "bytes": size}

    def whole(self, limit: int, affine: int, rows: int, y: Any) -> list[Callable[[], Any]]:
        from w4_driver import bind_whole

        n, k, torch = self.problem.n, self.problem.k, self.torch
        share = n if not limit else min(n, max(256, limit // (2 * k) // 256 * 256))
        workspace = torch.empty(share, k, device="cuda", dtype=torch.float16)
        function, x = self.function(Kernel("whole", affine)), self.x[:rows]
        launches = []
        for o in self.operands(affine):
            steps = [(first, min(share, n - first)) for first in range(0, n, share)]
            bound = [
                (first, size, bind_whole(function, self.problem, o, workspace, first, size))
                for first, size in steps
            ]

            def launch(bound: list[Any] = bound) -> None:
                for first, size, dequantize in bound:
                    dequantize()
                    torch.mm(x, workspace[:size].t(), out=y[:, first : first + size])

            launches.append(launch)
        return launches


def work(folder: Path) -> None:
    """Tasks of tasks.json that no line of results.jsonl tells of, in order."""
    tasks = json.loads((folder / "tasks.json").read_text())
    results = folder / "results.jsonl"
    done = {line["task"] for line in read_lines(results)}
    worker = Worker(folder)
    with results.open("a") as out:
        for number, task in enumerate(tasks):
            if number in done:
                continue
            (folder / "now").write_text(str(number))
            try:
                line = worker.run(task)
            except Exception as error:
                line = {"failed": f"{type(error).__name__}: {error}"[:200]}
            print(json.dumps({"task": number, **line}), file=out, flush=True)
            fatal = (
                "illegal",
                "launch failure",
                "trap",
                "unspecified",
                "misaligned",
                "uncorrectable",
                "instruction",
            )
            if any(word in line.get("failed", "").lower() for word in fatal):
                sys.exit(3)  # the context is lost; the next process goes on


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def supervise(folder: Path, deadline: float) -> None:
    """Workers until every task has its line or the time is over; a task that took its worker down fails, and so does
    every other of that kernel."""
    tasks, results = json.loads((folder / "tasks.json").read_text()), folder / "results.jsonl"

    def fail(number: int, why: str) -> None:
        told = {line["task"] for line in read_lines(results)}
        same = [(t["kind"], t["affine"], t["config"]) for t in tasks]
        with results.open("a") as out:
            for i, key in enumerate(same):
                if i not in told and key == same[number]:
                    print(json.dumps({"task": i, "failed": why}), file=out)

    while time.time() < deadline and len(read_lines(results)) < len(tasks):
        (folder / "now").write_text("-1")
        process = subprocess.Popen([sys.executable, __file__, "--work", "--out", str(folder)])
        last, number, silent_since = "", 0, time.time()
        why = ""
        while process.poll() is None:
            time.sleep(0.2)
            now = (folder / "now").read_text() + str(results.stat().st_size if results.exists() else 0)
            if now != last:
                last, silent_since = now, time.time()
            patience = SILENT_SECONDS * (3 if now.startswith("-1") else 1)  # imports, and the first of CUDA
            if time.time() - silent_since > patience or time.time() > deadline:
                why = "hung" if time.time() <= deadline else "out of time"
                process.kill()
                process.wait()
        if process.returncode == 0 or why == "out of time":
            continue
        number = int((folder / "now").read_text() or -1)
        if number < 0:
            print(f"the worker ended with {process.returncode} before its first task")
            return
        fail(number, why or f"worker ended with {process.returncode}")


def is_right(result: dict[str, Any]) -> bool:
    errors = (result["error"], result.get("ragged_error", 0.0))
    return all(e <= LARGEST_ERROR for e in errors) and result.get("outside_untouched", True)  # a NaN is not


def report(folder: Path, machine: str) -> None:
    tasks, lines = json.loads((folder / "tasks.json").read_text()), read_lines(folder / "results.jsonl")
    results = [{**tasks[line["task"]], "name": name_of(tasks[line["task"]]), **line} for line in lines]
    (folder / "w4_regimes.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    failures: dict[tuple[str, str], list[str]] = {}
    for r in results:
        where = f"{r['shape']} M={r['rows']} {'affine' if r['affine'] else 'nf4'}"
        if "failed" in r:
            failures.setdefault((r["name"], r["failed"]), []).append(where)
        elif not is_right(r):
            told = f"WRONG {r['error']:.1e}, ragged {r.get('ragged_error', 0):.1e}, outside {r.get('outside_untouched')}"
            failures.setdefault((r["name"], told), []).append(where)
        elif not r.get("same_bits", True):
            failures.setdefault((r["name"], "bits differ from run to run"), []).append(where)
    for (name, why), places in failures.items():
        print(f"{name}: {why[:120]}: {len(places)} times, first at {places[0]}")
    fine = [r for r in results if "us" in r and is_right(r)]
    print(
        "M     codes   kind      "
        + "".join(f"{shape:>9s}" for shape in SHAPES)
        + "    layer, us (best of each kind)"
    )
    for rows in (0, *ROWS):
        for affine in (0, 1):
            for kind in ("read", "few", "tile", "triton", "whole", "cublas"):
                best = {}
                for r in fine:
                    if (r["rows"], r["affine"], r["kind"]) == (rows, affine, kind):
                        best[r["shape"]] = min(best.get(r["shape"], 1e9), r["us"])
                if best:
                    cells = "".join(f"{best.get(shape, float('nan')):9.1f}" for shape in SHAPES)
                    total = sum(best.values()) if len(best) == len(SHAPES) else float("nan")
                    print(f"{rows:<5d} {'affine' if affine else 'nf4   '}  {kind:8s}  {cells} {total:9.1f}")
    print("best variants")
    for rows in ROWS:
        for affine in (0, 1):
            for shape in SHAPES:
                mine = [r for r in fine if (r["rows"], r["affine"], r["shape"]) == (rows, affine, shape)]
                mine = sorted((r for r in mine if r["kind"] in ("few", "tile")), key=lambda r: r["us"])
                told = "; ".join(f"{r['us']:.1f} {r['name']}" for r in mine[:3])
                if told:
                    print(f"{rows:<5d} {'affine' if affine else 'nf4   '} {shape:8s} {told}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for cubins, results.jsonl and w4_regimes.json"
    )
    parser.add_argument("--seconds", type=float, default=200, help="after which no task is begun")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--work", action="store_true", help="internal: run the tasks that have no result")
    arguments = parser.parse_args()
    folder: Path = arguments.out
    if arguments.work:
        work(folder)
        return
    start = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps(list_tasks([int(r) for r in arguments.rows.split(",")])))
    (folder / "results.jsonl").unlink(missing_ok=True)
    for file, complaint in compile_all(folder, os.cpu_count() or 1).items():
        print(f"{file}: {complaint}")
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    supervise(folder, start + arguments.seconds)
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    machine = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    print(machine, f"{time.time() - start:.0f} s in all")
    report(folder, machine)


if __name__ == "__main__":
    main()
