"""4-bit linears behind 1 to 32 rows: what serves, and variants with other parts, absmax and tiles, on an H100.

python docs/experiments/w4_rows16.py --out FOLDER [--seconds 55] [--kinds nf4,affine]

Every variant is checked against float64 into poisoned outputs and for the same bits in four launches, then timed in a graph of
dependent launches, weights rotated past the L2; then whole layers in one graph; then where the blocks' time goes, by
the device's own clock. A worker process does it: one that dies costs its variant, and the next goes on.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_void_p
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from w4_next import ROWS, SHAPES, NextTile, all_variants, timelines, tried

from service.kernels.cuda import Launch, keep_in
from service.kernels.w4_linear import Kind, Shape, Weight, bind, plan
from service.kernels.w4_linear.cuda import Call, Workspace, load, parts_of
from tests.kernels.w4_weights import random_weight

DEVICE = torch.device("cuda")
ROTATED_BYTES = 192 << 20
LARGEST_ERROR = 6e-4
LAUNCHES, BLOCKS, MARKS = 12, 132, 16
STEPS = ("asked", "before over", "first stage", "products", "parts left", "parts there", "end")


def shape_of(kind: Kind, name: str) -> Shape:
    outs, in_features = SHAPES[name]
    return Shape(kind, outs, in_features, 128 if kind == "affine" else 64, torch.float16)


def absent(workspace: Workspace) -> Workspace:
    """Full of what no sum is, as parts that say themselves that they are there need it."""
    workspace.sums.view(torch.int32).fill_(-1)
    return workspace


class Bench:
    """One kind's four linears, each with as many copies as go past the L2."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.weights: dict[str, list[Weight]] = {}
        self.want: dict[str, Tensor] = {}
        self.x: dict[str, Tensor] = {}
        self.workspaces = Workspace(DEVICE), absent(Workspace(DEVICE))
        for name, (outs, in_features) in SHAPES.items():
            source = random_weight(kind, outs, in_features, str(DEVICE))
            first = source.pack(outs)
            copies = max(2, ROTATED_BYTES // first.codes.nbytes)
            self.weights[name] = [first] + [copy_of(first) for _ in range(copies - 1)]
            self.x[name] = torch.randn(max(ROWS), in_features, device=DEVICE).half()
            self.want[name] = self.x[name].double() @ source.dense().double().t()
            torch.cuda.empty_cache()

    def call(self, weight: Weight, variant: Any) -> Callable[[Tensor, Tensor], None]:
        told = isinstance(variant, NextTile) and variant.told
        return Call(weight, parts_of(weight), variant, self.workspaces[bool(told)])

    def measure(self, name: str, rows: int, variant: Any) -> dict[str, Any]:
        """`variant` None: as it serves."""
        x, want = self.x[name][:rows], self.want[name][:rows]
        if variant is None:
            served = [bind(weight, shape_of(self.kind, name)) for weight in self.weights[name]]
            launches: list[Callable[[], Any]] = [lambda p=p: p(x) for p in served]
            outputs = [served[0](x) for _ in range(4)]
        else:
            y = torch.empty_like(want, dtype=torch.float16)
            calls = [self.call(weight, variant) for weight in self.weights[name]]
            launches = [lambda call=call: call(x, y) for call in calls]
            outputs = []
            for _ in range(4):
                y.fill_(float("nan"))
                launches[0]()
                outputs.append(y.clone())
        error = float((outputs[0].double() - want).norm() / want.norm())
        same = all(torch.equal(outputs[0], other) for other in outputs)
        return {"us": time_of(launches), "error": error, "same": same}

    def layer(self, rows: int, chosen: dict[str, Any]) -> float:
        """Microseconds of the four linears in turn, in one graph of three layers."""
        launches: list[Callable[[], Any]] = []
        for copy in range(3):
            for name, variant in chosen.items():
                weight, x = self.weights[name][copy % len(self.weights[name])], self.x[name][:rows]
                if variant is None:
                    served = bind(weight, shape_of(self.kind, name))
                    launches.append(lambda product=served, x=x: product(x))
                else:
                    y = torch.empty(rows, weight.out_features, device=DEVICE, dtype=torch.float16)
                    call = self.call(weight, variant)
                    launches.append(lambda call=call, x=x, y=y: call(x, y))
        return time_of(launches) * len(SHAPES)

    def timeline(self, name: str, variant: NextTile) -> list[float]:
        """Medians over blocks and launches, microseconds: from a multiprocessor's last block to this one, then each
        step's from the one before it, of the tile's last block too; at last the clock in MHz."""
        x, workspace = self.x[name][:16], self.workspaces[variant.told]
        y = torch.empty(16, self.want[name].shape[1], device=DEVICE, dtype=torch.float16)
        trace = torch.zeros(LAUNCHES, BLOCKS, MARKS, dtype=torch.int64, device=DEVICE)
        launches: list[Callable[[], Any]] = []
        for number in range(LAUNCHES):
            weight = self.weights[name][number % len(self.weights[name])]
            call = Call(weight, parts_of(weight), variant, workspace)
            told = [*call.launch._arguments, c_void_p(trace[number].data_ptr())]
            call.launch = Launch(load(variant), told, dependent=True)
            launches.append(lambda call=call: call(x, y))
        time_of(launches)
        return summary(trace.tolist())


def copy_of(weight: Weight) -> Weight:
    zeros = None if weight.zeros is None else weight.zeros.clone()
    return Weight(weight.codes.clone(), weight.scales.clone(), zeros, weight.nested, weight.outs)


def time_of(launches: list[Callable[[], Any]]) -> float:
    """Median microseconds of a launch; one graph replays all in turn."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[3:])


def summary(trace: list[list[list[int]]]) -> list[float]:
    """Of marks [launch][block][mark]: clocks of a block's multiprocessor; nanoseconds of its begin; its multiprocessor."""
    ends: dict[
        int, tuple[int, int, int]
    ] = {}  # of each multiprocessor: clock, nanoseconds of the first block; clock
    found: list[list[float]] = [[] for _ in range(len(STEPS) + 1)]
    clocks = []
    for launch in trace:
        for marks in launch:
            place, begin = marks[15], marks[0]
            if not marks[7]:
                continue
            if place in ends:
                first, first_ns, last = ends[place]
                found[0].append(begin - last)
                clocks.append((begin - first) / max(1, marks[8] - first_ns))
                before = begin
                for step in range(1, 8):
                    if marks[step]:
                        found[step].append(marks[step] - before)
                        before = marks[step] if step != 1 else before
            ends[place] = (*ends.get(place, (begin, marks[8]))[:2], marks[7])
    per_us = statistics.median(clocks) * 1e3 if clocks else math.nan
    return [statistics.median(f) / per_us if f else math.nan for f in found] + [per_us]


def label_of(variant: Any) -> str:
    return "served" if variant is None else str(variant.label)


def tasks_of(kinds: list[Kind]) -> list[tuple[str, Kind, str, int, Any]]:
    """What there is to do, in order: the first of it is safe."""
    tasks: list[tuple[str, Kind, str, int, Any]] = []
    for kind in kinds:
        for name, (_, in_features) in SHAPES.items():
            tasks += [("time", kind, name, rows, None) for rows in ROWS]
            tasks += [("time", kind, name, rows, v) for rows in ROWS for v in tried(kind, rows, in_features)]
        tasks += [("layer", kind, "all", rows, None) for rows in ROWS]
        tasks += [("timeline", kind, name, 16, v) for v in timelines(kind) for name in SHAPES]
    return tasks


def work(folder: Path, kinds: list[Kind]) -> None:
    """Tasks that have no line yet; a variant that took a worker down is left out."""
    tasks, results = tasks_of(kinds), folder / "results.jsonl"
    lines = read(results)
    done = {line["task"] for line in lines}
    banned = {label_of(tasks[line["task"]][4]) for line in lines if line.get("fatal")}
    bench: Bench | None = None
    with results.open("a") as out:
        for number, (what, kind, name, rows, variant) in enumerate(tasks):
            if number in done or (label_of(variant) in banned and variant is not None):
                continue
            (folder / "now").write_text(str(number))
            if bench is None or bench.kind != kind:
                bench = None
                torch.cuda.empty_cache()
                torch.manual_seed(0)
                bench = Bench(kind)
            line: dict[str, Any] = {"task": number}
            try:
                if what == "time":
                    line |= bench.measure(name, rows, variant)
                elif what == "timeline":
                    line["steps"] = bench.timeline(name, variant)
                else:
                    best = best_of(tasks, read(results), kind, rows)
                    line |= {
                        "served": bench.layer(rows, dict.fromkeys(SHAPES)),
                        "best": bench.layer(rows, best),
                    }
            except Exception as error:
                line["failed"] = f"{type(error).__name__}: {error}"[:150]
                line["fatal"] = is_lost()
            print(json.dumps(line), file=out, flush=True)
            if line.get("fatal"):
                sys.exit(3)


def is_lost() -> bool:
    """The device's context, which no later launch would survive."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_right(line: dict[str, Any]) -> bool:
    return "us" in line and line["error"] <= LARGEST_ERROR and line["same"]


def best_of(tasks: list[Any], lines: list[dict[str, Any]], kind: Kind, rows: int) -> dict[str, Any]:
    found: dict[str, tuple[float, Any]] = {}
    for line in lines:
        what, its_kind, name, its_rows, variant = tasks[line["task"]]
        if what == "time" and (its_kind, its_rows) == (kind, rows) and is_right(line):
            found[name] = min(
                found.get(name, (math.inf, None)), (line["us"], variant), key=lambda pair: pair[0]
            )
    return {name: found[name][1] if name in found else None for name in SHAPES}


def report(folder: Path, kinds: list[Kind]) -> None:
    tasks, lines = tasks_of(kinds), read(folder / "results.jsonl")
    cells: dict[tuple[Kind, int], dict[str, dict[str, float]]] = {}
    for line in lines:
        what, kind, name, rows, variant = tasks[line["task"]]
        if what == "time" and is_right(line):
            cells.setdefault((kind, rows), {}).setdefault(label_of(variant), {})[name] = line["us"]
        elif "failed" in line or what == "time":
            print("WRONG", kind, name, rows, label_of(variant), line.get("failed", line))
    for (kind, rows), variants in sorted(cells.items()):
        print(f"{f'{kind}, {rows} rows':32}{''.join(f'{name:>8}' for name in SHAPES)}     sum")
        best = {name: min(us.get(name, math.inf) for us in variants.values()) for name in SHAPES}
        for label, us in {"best of each": best, **variants}.items():
            told = "".join(f"{us[name]:8.2f}" if name in us else f"{'':8}" for name in SHAPES)
            print(f"{label:32}{told}{f'{sum(us.values()):8.2f}' if len(us) == len(SHAPES) else ''}")
    for line in lines:
        what, kind, _, rows, _ = tasks[line["task"]]
        if what == "layer" and "served" in line:
            print(f"{kind} {rows}, layers in one graph: served {line['served']:.1f}, best {line['best']:.1f}")
    print(
        "16 rows, where a block is, us".ljust(44)
        + "".join(f"{step:>13}" for step in ("gap", *STEPS))
        + "  MHz"
    )
    for line in lines:
        what, kind, name, _, variant = tasks[line["task"]]
        if "steps" in line:
            told = "".join(f"{step:13.2f}" for step in line["steps"][:-1])
            print(f"{kind:7}{name:8}{label_of(variant):29}{told} {line['steps'][-1]:6.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for cubins and results.jsonl")
    parser.add_argument("--seconds", type=float, default=55, help="after which workers are stopped")
    parser.add_argument("--kinds", default="nf4,affine")
    parser.add_argument("--work", action="store_true", help="internal: do the tasks that have no result")
    arguments = parser.parse_args()
    folder, kinds = arguments.out, arguments.kinds.split(",")
    keep_in(folder)
    if arguments.work:
        work(folder, kinds)
        return
    start = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    results.unlink(missing_ok=True)
    served = {row.variant for kind in kinds for name in SHAPES for row in plan(shape_of(kind, name))
              if row.max_rows and row.max_rows <= max(ROWS)}  # fmt: skip
    from service.kernels.cuda.cubins import cubin

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda variant: cubin(variant.program), [*served, *all_variants(tuple(kinds))]))
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    while (left := start + arguments.seconds - time.time()) > 0:
        command = [sys.executable, __file__, "--work", "--out", str(folder), "--kinds", arguments.kinds]
        try:
            done = subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print("out of time")
            break
        if done.returncode == 0:
            break
        number = int((folder / "now").read_text())
        if number not in {line["task"] for line in read(results)}:
            with results.open("a") as out:
                print(
                    json.dumps({"task": number, "fatal": True, "failed": f"ended with {done.returncode}"}),
                    file=out,
                )
    query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
    print(subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip())
    report(folder, kinds)
    print(f"{time.time() - start:.0f} s in all")


if __name__ == "__main__":
    main()
