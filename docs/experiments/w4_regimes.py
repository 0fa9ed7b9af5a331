"""W4 linears at M = 1 ... 1024 on Llama-3.1-8B's four shapes: every variant built, checked and timed in one call.

python docs/experiments/w4_regimes.py --out FOLDER [--seconds 200] [--rows 1,16,64,256,1024]

Own kernels (production's w4_few.cu and w4_tile.cu) and a kernel that only reads the same bytes. Checked against float64 on fresh random
inputs with poisoned outputs, also with fewer rows than the tile, and twice for the same bits; timed in CUDA graphs with
weights rotated past the L2, plain and as dependent launches. At last whole layers, qkv, o, gate_up, down in turn, with
the best variant of each. A worker process runs them: one that dies or hangs costs that variant, and the next worker
goes on.
"""

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from graph_times import capture, replays_us
from w4_variants import SHAPES, Kernel, compile_all, kernels_for
from workers import measure, read_lines, work

ROWS = (1, 2, 8, 16, 32, 64, 128, 256, 384, 512, 576, 640, 768, 896, 1024)
ROTATED_BYTES = 192 << 20
# relative, in norm; cuBLAS on dequantized float16 weights has 2.9e-4. bfloat16: half a unit in the last place is 2e-3
LARGEST_ERROR = (6e-4, 4e-3)


def list_tasks(all_rows: list[int]) -> list[dict[str, Any]]:
    tasks: list[dict[str, Any]] = []
    for shape in SHAPES:
        for affine in (0, 1):
            common: dict[str, Any] = {"shape": shape, "affine": affine}
            tasks += [{**common, "kind": "read", "rows": 0, "config": (blocks,)} for blocks in (1, 2, 4)]
            for rows in all_rows:
                for kernel in kernels_for(shape, rows, affine):
                    tasks.append({**common, "rows": rows, "kind": kernel.family, "config": kernel.config})
    for affine in (0, 1):
        tasks += [
            {"shape": "layer", "affine": affine, "kind": "layer", "rows": rows, "config": (most,)}
            for rows in all_rows
            for most in ((1, 2) if rows <= 8 else (1,))
        ]
    return tasks


def name_of(task: dict[str, Any]) -> str:
    return f"{task['kind']} {','.join(map(str, task['config']))}"


def best_kernels(folder: Path, rows: int, affine: int, most: int) -> dict[str, Kernel]:
    """By shape, of the float16 variants that were right and launch at most so many blocks a multiprocessor."""
    tasks, found = json.loads((folder / "tasks.json").read_text()), {}
    for line in read_lines(folder / "results.jsonl"):
        r = {**tasks[line["task"]], **line}
        mine = (r["rows"], r["affine"]) == (rows, affine) and r["kind"] in ("few", "tile")
        if not mine or "us" not in r or not is_right(r) or r["config"][-1]:
            continue
        if Kernel(r["kind"], affine, tuple(r["config"])).values["EACH"] <= most:
            found[r["shape"]] = min(found.get(r["shape"], (1e9, r)), (r["us"], r), key=lambda pair: pair[0])
    return {shape: Kernel(r["kind"], affine, tuple(r["config"])) for shape, (_, r) in found.items()}


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
        self.reader = Function(self.driver, folder / "read.cubin", "read_only", 512, 0)
        self.arena = torch.randint(0, 1 << 31, (ROTATED_BYTES // 8 + (16 << 20),), device="cuda")
        self.shape = ""
        self.layers: dict[str, Any] = {}

    def function(self, kernel: Kernel) -> Any:
        """-> compiled kernel, its workspace."""
        from w4_driver import Workspace, load

        if kernel not in self.functions:
            self.functions[kernel] = load(self.driver, kernel, self.folder), Workspace(kernel)
        return self.functions[kernel]

    def problem_of(self, shape: str) -> Any:
        from w4_problem import Problem

        n, k = SHAPES[shape]
        outs = (4096, 1024, 1024) if shape == "qkv" else (n // 2, n // 2) if shape == "gate_up" else (n,)
        return Problem(n, k, "cuda", parts=outs)

    def set_shape(self, shape: str) -> None:
        torch, (n, k) = self.torch, SHAPES[shape]
        self.shape, self.copied = shape, {}
        self.want: dict[tuple[int, int], Any] = {}
        torch.cuda.empty_cache()
        self.problem = self.problem_of(shape)
        x = torch.randn(1024, k, device="cuda")
        self.x = (x.half(), x.bfloat16())
        self.copies = max(2, ROTATED_BYTES // (n * k // 2))

    def operands(self, affine: int) -> list[tuple[Any, ...]]:
        if affine not in self.copied:
            first = self.problem.affine if affine else self.problem.nf4
            self.copied[affine] = [first] + [tuple(t.clone() for t in first) for _ in range(self.copies - 1)]
            dense = self.problem.dense(affine).double()
            for bf16 in (0, 1):
                self.want[affine, bf16] = self.x[bf16].double() @ dense.t()
        return self.copied[affine]

    def bytes_of(self, affine: int) -> int:
        """What one launch must read of the weights, as production holds them."""
        codes, scales, zeros, nested = self.problem.affine if affine else self.problem.nf4
        rest = scales.nbytes + (zeros.nbytes if affine else nested.nbytes)
        return int(codes.nbytes + rest)

    def time(self, launches: list[Callable[[bool], Any]], dependent: bool) -> tuple[float, float]:
        """Median microseconds of a launch and the sample's range; one graph replays all launches in turn."""
        graph = capture(partial(launch, dependent) for launch in launches)
        times = [us / len(launches) for us in replays_us(graph)]
        return statistics.median(times), max(times) - min(times)

    def error(self, y: Any, rows: int, affine: int, bf16: int) -> float:
        want = self.want[affine, bf16][:rows]
        return float((y[:rows].double() - want).norm() / want.norm())

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        affine, rows = task["affine"], task["rows"]
        if task["kind"] == "layer":
            return self.run_layer(rows, affine, task["config"][0])
        if task["shape"] != self.shape:
            self.set_shape(task["shape"])
        operands = self.operands(affine)
        if task["kind"] == "read":
            return self.run_read(self.bytes_of(affine), task["config"][0])
        return self.own(Kernel(task["kind"], affine, tuple(task["config"])), operands, rows)

    def own(self, kernel: Kernel, operands: list[Any], rows: int) -> dict[str, Any]:
        from w4_driver import LOCAL_BYTES, NUM_REGISTERS, bind

        torch, bf16 = self.torch, kernel.values["BF16"]
        x = self.x[bf16]
        y = torch.full((rows, self.problem.n), float("nan"), device="cuda", dtype=x.dtype)
        function, workspace = self.function(kernel)
        launches = [bind(function, kernel, workspace, self.problem, o, x, y, rows) for o in operands]
        result: dict[str, Any] = {
            "registers": function.attribute(NUM_REGISTERS),
            "local": function.attribute(LOCAL_BYTES),
        }
        fewer = max(1, rows - 3)
        bind(function, kernel, workspace, self.problem, operands[-1], x, y, fewer)(False)
        torch.cuda.synchronize()
        result["ragged_error"] = self.error(y, fewer, kernel.affine, bf16)
        result["outside_untouched"] = bool(y[fewer:].isnan().all())
        y.fill_(float("nan"))
        launches[0](False)
        torch.cuda.synchronize()
        result["error"] = self.error(y, rows, kernel.affine, bf16)
        first = y.clone()
        result["plain_us"], _ = self.time(launches, False)
        result["us"], result["spread"] = self.time(launches, True)
        torch.cuda.synchronize()
        result["same_bits"] = bool(torch.equal(first, y)) or bool(first.isnan().any())
        return result

    def run_layer(self, rows: int, affine: int, most: int) -> dict[str, Any]:
        """The four linears in turn, three layers of weights, each launch behind the one before it."""
        from w4_driver import bind

        torch = self.torch
        kernels = best_kernels(self.folder, rows, affine, most)
        if len(kernels) < len(SHAPES):
            return {"failed": "a shape has no variant that is right"}
        launches, alive = [], []
        for _ in range(3):
            for shape, kernel in kernels.items():
                if shape not in self.layers:
                    self.layers[shape] = [self.problem_of(shape) for _ in range(3)]
                problem = self.layers[shape][len(launches) // len(SHAPES)]
                operands = problem.affine if affine else problem.nf4
                x = torch.randn(1024, problem.k, device="cuda").half()[:rows]
                y = torch.empty(rows, problem.n, device="cuda", dtype=torch.float16)
                alive.append((x, y))
                function, workspace = self.function(kernel)
                launches.append(bind(function, kernel, workspace, problem, operands, x, y, rows))
        plain, us = (self.time(launches, dependent)[0] * len(SHAPES) for dependent in (False, True))
        return {
            "us": us,
            "plain_us": plain,
            "error": 0.0,
            "kernels": {k: v.label for k, v in kernels.items()},
        }

    def run_read(self, size: int, blocks: int) -> dict[str, Any]:
        import ctypes

        from w4_driver import multiprocessors

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
            launches.append(self.reader.bind(blocks * multiprocessors(), 0, arguments))
        us, spread = self.time(launches, False)
        return {"us": us, "spread": spread, "error": 0.0, "bytes": size}


def is_right(result: dict[str, Any]) -> bool:
    errors = (result["error"], result.get("ragged_error", 0.0))
    bf16 = result["config"][-1] if result["kind"] in ("few", "tile") else 0
    return all(e <= LARGEST_ERROR[bf16] for e in errors) and result.get(
        "outside_untouched", True
    )  # a NaN is not


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
        "microseconds, plain launches > dependent ones; best of each kind, best of all, the layer in one graph"
    )
    print("M     codes   kind    " + "".join(f"{shape:>15s}" for shape in (*SHAPES, "sum")))
    for rows in (0, *ROWS):
        for affine in (0, 1):
            codes = "affine" if affine else "nf4   "
            for kinds in (("read",), ("few",), ("tile",), ("few", "tile")):
                best: dict[str, tuple[float, float]] = {}
                for r in fine:
                    is_mine = (r["rows"], r["affine"]) == (rows, affine) and r["kind"] in kinds
                    if is_mine and (r["kind"] == "read" or not r["config"][-1]):  # float16
                        pair = (r.get("plain_us", r["us"]), r["us"])
                        old = best.get(r["shape"], pair)
                        best[r["shape"]] = (min(old[0], pair[0]), min(old[1], pair[1]))
                if not best or (len(kinds) == 2 and len(best) < len(SHAPES)):
                    continue
                pairs = [best.get(shape, (math.nan, math.nan)) for shape in SHAPES]
                pairs.append((sum(p for p, _ in pairs), sum(d for _, d in pairs)))
                cells = "".join(f"{plain:8.1f} >{us:5.1f}" for plain, us in pairs)
                print(f"{rows:<5d} {codes}  {'best' if len(kinds) == 2 else kinds[0]:6s}{cells}")
            for r in fine:
                if (r["kind"], r["rows"], r["affine"]) == ("layer", rows, affine):
                    most = "" if r["config"][0] > 1 or rows > 8 else ", of one block a multiprocessor"
                    print(f"{rows:<5d} {codes}  layer {r['plain_us']:.1f} > {r['us']:.1f}{most}")
    print("variants, by their dependent launches; bfloat16 ends in 1")
    for rows in ROWS:
        for affine in (0, 1):
            for shape in SHAPES:
                mine = [r for r in fine if (r["rows"], r["affine"], r["shape"]) == (rows, affine, shape)]
                mine = sorted((r for r in mine if r["kind"] in ("few", "tile")), key=lambda r: r["us"])
                told = "; ".join(f"{r['plain_us']:.1f}>{r['us']:.1f} {r['name']}" for r in mine[:5])
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
        work(folder, Worker(folder).run)
        return
    all_rows = [int(rows) for rows in arguments.rows.split(",")]

    def compiled(folder: Path, workers: int) -> dict[str, str]:
        return compile_all(folder, all_rows, workers)

    def kind(task: dict[str, Any]) -> Any:
        return task["kind"], task["affine"], task["config"]

    machine = measure(Path(__file__), folder, list_tasks(all_rows), compiled, arguments.seconds, kind)
    report(folder, machine)


if __name__ == "__main__":
    main()
