"""Does another algorithm of cublasLt than torch's take less time, or fewer joules under the power cap?

python docs/experiments/w16_algorithms.py --out FOLDER [--seconds 70] [--algorithms 32] [--neighbours 20] [--dry-run]

Llama-3.1-8B's four linears in float16. Alone: every algorithm that the heuristics name for a shape and a number of rows, and
for the first two shapes at most rows also what differs from the best in one attribute; each captured over weights past the
L2, rounds interleaved, medians, its output held against float64 (relative error, in norm). Sustained: torch and the fastest,
kept up for a second or so, there and back, with joules and clock. At last the kernels' names, by the profiler.
`--dry-run` needs no GPU: w16_cublaslt_fake.c, compiled here, and products a thousandth of the size.
"""

import argparse
import gc
import json
import subprocess
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from w16_cublaslt import Algorithm, Library, loaded_library
from w16_products import SHOWN, Bench, Cell
from w16_sustained import Board, Contender, Cpu, Gpu, there_and_back

LAYER = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
NUM_SUSTAINED = 3
PROMISING = 4  # that are also sustained, of each of the first two shapes
FIRST = ("gate_up", "down", "qkv", "o")  # the order in which they are measured
ROWS = (1024, 768, 256, 448, 832, 704, 512, 640, 576, 128)  # likewise
CONTENDER_SECONDS, LAYER_SECONDS, ZEROS_SECONDS = 0.5, 1.0, 0.5  # of a stretch
SUSTAINED_SECONDS, NAMES_SECONDS, REPORT_SECONDS = 36.0, 5.0, 1.0  # left for them, at least
DRY_SHARE, DRY_ROWS = 64, 16  # a dry run divides by them


class Run:
    """What is measured in which order, until the time is over; everything found so far can be told."""

    def __init__(self, bench: Bench, board: Board | None, end: float, rows: list[int], count: int) -> None:
        self.bench, self.board, self.end, self.rows, self.count = bench, board, end, rows, count
        self.cells: dict[tuple[str, int], Cell] = {}
        self.sustained: dict[str, list[dict[str, Any]]] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def measure_alone(self, all_rows: Sequence[int]) -> None:
        slowest = 1.0
        for rows in all_rows:
            for name in FIRST:
                if self.left() < slowest + NAMES_SECONDS + REPORT_SECONDS:
                    print(f"{name} {rows}: no time")
                    continue
                begin = time.monotonic()
                cell = self.cells[name, rows] = self.bench.cell(name, rows, self.count)
                slowest = max(slowest, time.monotonic() - begin)
                print(cell.line(), flush=True)
            self.print_layer(rows)

    def print_layer(self, rows: int) -> None:
        cells = [self.cells.get((name, rows)) for name in LAYER]
        if all(cells):
            torch_us = sum(c.torch.us for c in cells if c)
            best_us = sum(c.torch.us * min([1.0, *(t.ratio for t in c.best(1))]) for c in cells if c)
            print(
                f"layer   {rows:5} torch {torch_us:6.1f}  best of each {best_us:6.1f} ({best_us / torch_us - 1:+.1%})"
            )

    def fastest(self, rows: int) -> dict[str, Algorithm | None]:
        """torch where nothing is ahead of it."""
        best = {name: self.cells[name, rows].best(1) for name in LAYER}
        return {
            name: each[0].algorithm if each and each[0].ratio < 1 else None for name, each in best.items()
        }

    def measure_neighbours(self, rows: int, count: int) -> None:
        for name in FIRST[:2]:
            if count and (name, rows) in self.cells and self.left() > SUSTAINED_SECONDS:
                self.cells[name, rows] = self.bench.add_neighbours(self.cells[name, rows], count)
                print(f"with neighbours {self.cells[name, rows].line()}", flush=True)

    def compare(self, title: str, contenders: list[Contender], seconds: float) -> list[dict[str, Any]]:
        needed = (2 * len(contenders) + 1) * (seconds + 0.2) + REPORT_SECONDS
        if self.left() < needed:
            print(f"{title}: no time")
            return []
        told = self.sustained[title] = there_and_back(self.bench.machine, self.board, contenders, seconds)
        print(f"{title}: us, joules, watts, MHz, share of readings under the power cap")
        for each in sorted(told, key=lambda each: each["us"]):
            gain = each["us"] / told[0]["us"] - 1
            print(f"  {each['us']:7.1f} ({gain:+.1%}) {each['joules']:.4f} J {each['watts']:5.0f} W {each['mhz']:5.0f} "
                  f"{each['capped']:4.0%}  {each['name']}  [{' '.join(f'{us:.1f}' for us in each['each_us'])}]",
                  flush=True)  # fmt: skip
        return told

    def measure_sustained(self, all_rows: Sequence[int]) -> None:
        torch_layer: dict[str, Algorithm | None] = dict.fromkeys(LAYER)
        for rows in all_rows:
            if any((name, rows) not in self.cells for name in LAYER):
                continue
            chosen = {"torch": torch_layer, "fastest alone": self.fastest(rows)}
            if rows == all_rows[0]:
                chosen["fastest sustained"] = self.fastest(rows) | {
                    name: self.fastest_sustained(name, rows) for name in FIRST[:2]
                }
            different = {n: each for n, each in chosen.items() if n == "torch" or each != torch_layer}
            contenders = [self.bench.layer(name, rows, each) for name, each in different.items()]
            seconds = LAYER_SECONDS * (1 if rows == all_rows[0] else 0.7)
            self.compare(f"layer at {rows} rows", contenders, seconds)
        rows = all_rows[0]
        pair = [
            self.bench.layer(f"x of {what}", rows, torch_layer, what == "zeros")
            for what in ("normals", "zeros")
        ]
        self.compare(f"torch's layer at {rows} rows, by what it multiplies", pair, ZEROS_SECONDS)

    def fastest_sustained(self, name: str, rows: int) -> Algorithm | None:
        cell = self.cells[name, rows]
        timed = [cell.torch, *cell.best(PROMISING)]
        contenders = [self.bench.repeated(name, rows, each) for each in timed]
        told = self.compare(f"{name} at {rows} rows", contenders, CONTENDER_SECONDS)
        us = [each["us"] for each in told] or [0.0]
        return timed[us.index(min(us))].algorithm

    def find_kernels(self) -> None:
        """Which kernel stands behind a name: launches one by one, a marker after each."""
        marker = torch.zeros(1, device="cuda")
        asked = [(cell, each) for cell in self.cells.values() for each in (cell.torch, *cell.best(SHOWN))]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
            for cell, each in asked:
                self.bench.launches(cell.shape, cell.rows, each.algorithm)[-1]()
                marker.add_(1)
            torch.cuda.synchronize()
        events = sorted(
            (event.start_ns(), event.name())
            for event in traced.profiler.kineto_results.events()
            if event.device_type() == torch.autograd.DeviceType.CUDA
        )
        groups: list[list[str]] = [[]]
        for _, name in events:
            if "elementwise" in name:
                groups.append([])
            else:
                groups[-1].append(name[:90])
        if len(groups) != len(asked) + 1:
            print(f"kernels unknown: the profiler saw {len(groups) - 1} launches of {len(asked)}")
            return
        for (cell, each), names in zip(asked, groups, strict=False):
            cell.kernels[each.name] = " + ".join(names)
        for cell in self.cells.values():
            told = "; ".join(cell.kernels[each.name] for each in (cell.torch, *cell.best(1)))
            print(f"{cell.shape:8}{cell.rows:5} torch, best: {told}")

    def told(self) -> dict[str, Any]:
        cells = []
        for cell in self.cells.values():
            timed = [
                {
                    **{name: getattr(t, name) for name in ("name", "us", "ratio", "error", "failed")},
                    "algo": t.algorithm.data.hex() if t.algorithm else "",
                    "workspace_bytes": t.algorithm.workspace_bytes if t.algorithm else 0,
                    "waves": t.algorithm.waves if t.algorithm else 0,
                    "kernel": cell.kernels.get(t.name, ""),
                }
                for t in cell.timed
            ]
            cells.append({"shape": cell.shape, "rows": cell.rows, "timed": timed})
        return {"cells": cells, "sustained": self.sustained}


def fake_library(folder: Path) -> Path:
    source, target = Path(__file__).with_name("w16_cublaslt_fake.c"), folder / "libcublasLt_fake.so"
    subprocess.run(
        [
            "cc",
            "-O3",
            "-march=native",
            "-ffast-math",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Werror",
            "-o",
            target,
            source,
        ],
        check=True,
    )
    return target


def open_board() -> Board | None:
    try:
        board = Board(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
        print(board.state())
    except OSError as error:  # times are worth having without joules
        print(f"no joules and no clock: {error}")
        return None
    return board


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for w16_algorithms.json")
    parser.add_argument("--seconds", type=float, default=70, help="after which nothing new is begun")
    parser.add_argument(
        "--algorithms", type=int, default=32, help="asked of the heuristics, for each shape and rows"
    )
    parser.add_argument(
        "--neighbours", type=int, default=20, help="of each of the best three at most rows; 0: none"
    )
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="the first three are also sustained")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU, with a library that is made up"
    )
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    shapes, rows = LAYER, [int(each) for each in arguments.rows.split(",")]
    machine: Gpu | Cpu
    if arguments.dry_run:
        shapes = {name: (n // DRY_SHARE, k // DRY_SHARE) for name, (n, k) in LAYER.items()}
        rows, machine, board, path = [r // DRY_ROWS for r in rows], Cpu(), None, fake_library(folder)
    else:
        machine, board = Gpu(), open_board()
        square = torch.ones(64, 64, device="cuda", dtype=torch.float16)
        torch.mm(square, square)
        path = loaded_library()
    gc.disable()  # what it frees inside a capture would spoil it
    with machine.on_stream():
        library = Library(path)
        what = "made up" if arguments.dry_run else torch.cuda.get_device_name()
        print(
            f"{what}, torch {torch.__version__}, cublasLt {library.version} of {path}, {len(library.names)} names"
        )
        run = Run(Bench(machine, library, shapes, max(rows)), board, end, rows, arguments.algorithms)
        print(f"{arguments.seconds - run.left():.0f} s until the operands were there", flush=True)
        try:
            run.measure_alone(rows[:NUM_SUSTAINED])
            run.measure_neighbours(rows[0], arguments.neighbours)
            with board or nullcontext():
                run.measure_sustained(rows[:NUM_SUSTAINED])
            run.measure_alone(rows[3:])
            if not arguments.dry_run and run.left() > 0:
                run.find_kernels()
        finally:
            head = {"machine": what, "torch": torch.__version__, "cublaslt": library.version}
            (folder / "w16_algorithms.json").write_text(json.dumps({**head, **run.told()}, indent=1))
            print(f"{arguments.seconds - run.left():.0f} s in all")


if __name__ == "__main__":
    main()
