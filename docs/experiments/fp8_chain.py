"""fp8's linears of few rows behind the kernels that make their rows: who serves a layer of Llama-3.1-8B fastest on an H100.

python docs/experiments/fp8_chain.py [--rows 1,16,64] [--seconds 90] [--list]
python docs/experiments/fp8_chain.py --candidates [--rows 1,16,32,64] [--seconds 60]

A chain is 8 layers in one CUDA graph, launched dependently as a decode step launches them: rows of the norm, qkv, attention
over 640 tokens, its rows, o, rows of the norm, gate_up, rows of the gate, down. Each has weights of its own, 1.7 GB in all.
Of the last layer every product is held against float64 in 64 outputs, as the graph has left it. Tables, in this order:

- chains with one kind of kernel in all four places, also with the kernels of rows letting their successor begin before they
  wait themselves (`first`), and asking for the largest shared memory (`carveout`)
- each linear alone, behind itself
- chains with one place changed, and the mix that follows from them
- the same over settings of Triton's kernel near those that serve

`--candidates`: whole assignments of the four linears instead (fp8_assignments.py), in chains and alone.

A process does the work; one that dies costs what it was at, and the next begins anew without it. `--list` needs no GPU.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from fp8_assignments import assignments, served_kernels, tried_by_triton, ways_of
from fp8_layer import ATTENTION, CUDA, EPS, LAYERS, WAYS, Bench, Way, load, random_weight
from fp8_variants import WIDE, ByTriton, Choice, Nobody, candidates, kernels, most_sums, room, swept
from w8_variants import SHAPES, Kernel

from service.engine.kernels_ahead import META, compile_all
from service.kernels import decode_attention as attention
from service.kernels.fp8_linear import triton as fp8

ROUNDS = 3


class OutOfTimeError(Exception):
    pass


class Report:
    """Measures in turn, tells a file what it is at, and leaves out what took an earlier process down."""

    def __init__(self, deadline: float, now: Path, without: list[str]) -> None:
        self.deadline, self.now, self.without = deadline, now, without
        self.begun = time.time()

    def cell(self, what: str, measure: Callable[[], float]) -> float:
        """NaN for what is left out."""
        if time.time() > self.deadline:
            raise OutOfTimeError
        if what in self.without:
            return float("nan")
        self.now.write_text(what)
        return measure()

    def line(self, label: str, cells: Iterable[float], behind: str = "") -> None:
        """A wrong result is told by a !."""
        told = "".join(f"{abs(us):9.1f}{'!' if us < 0 else ' '}" for us in cells)
        print(f"{label:36}{told} {behind}", flush=True)

    def title(self, text: str, columns: Iterable[object] = ()) -> None:
        told = "".join(f"{column!s:>10}" for column in columns)
        print(f"\n{f'[{time.time() - self.begun:.0f} s] {text}':36}{told}", flush=True)


def show_chains(report: Report, bench: Bench) -> dict[Way, str]:
    """-> the fastest for each way."""
    fastest: dict[Way, tuple[float, str]] = {}
    told = candidates(bench.rows)
    told["nobody"] = dict.fromkeys(SHAPES, Nobody())
    report.title(f"{bench.rows} rows, us a layer in a chain", WAYS)
    for label, choices in told.items():
        cells = [
            report.cell(f"{bench.rows} {label} {way}", partial(bench.chain, choices, way)) for way in WAYS
        ]
        report.line(label, cells)
        for way, us in zip(WAYS, cells, strict=True):
            if us > 0 and label != "nobody":
                fastest[way] = min(fastest.get(way, (us, label)), (us, label))
    return {way: label for way, (_, label) in fastest.items()}


def show_alone(report: Report, bench: Bench) -> None:
    report.title(f"{bench.rows} rows, us of each linear alone", (*SHAPES, "layer"))
    for label, choices in candidates(bench.rows).items():
        cells = [
            report.cell(f"{bench.rows} {label} {name} alone", partial(bench.alone, choice, name))
            for name, choice in choices.items()
        ]
        report.line(label, [*cells, sum(map(abs, cells))])


def show_places(
    report: Report, bench: Bench, way: Way, start: dict[str, Choice], tried: dict[str, dict[str, Choice]]
) -> None:
    """`tried`: label -> linear -> who takes its place in `start`; then the best of every place together."""
    fastest = dict(start)
    usual = report.cell(f"{bench.rows} start {way}", partial(bench.chain, start, way))
    report.title(f"{bench.rows} rows, {way}: {usual:.1f}, with", SHAPES)
    best = dict.fromkeys(SHAPES, abs(usual))
    for label, choices in tried.items():
        columns: dict[str, float] = {}
        for name in SHAPES:
            if name not in choices or choices[name] == start[name]:
                columns[name] = usual if name in choices else float("nan")
                continue
            what = f"{bench.rows} {label} {name} {way}"
            us = columns[name] = report.cell(what, partial(bench.chain, {**start, name: choices[name]}, way))
            if 0 < us < best[name]:
                best[name], fastest[name] = us, choices[name]
        report.line(label, columns.values())
    mixed = report.cell(f"{bench.rows} mix {way}", partial(bench.chain, fastest, way))
    report.line("mix", [mixed], "; ".join(f"{name}: {choice}" for name, choice in fastest.items()))


def show_candidates(report: Report, bench: Bench) -> None:
    """Each linear alone, each chain ROUNDS times in turn; medians of what was measured in time."""
    told = assignments(bench.rows)
    alone: dict[tuple[str, Choice], float] = {}
    chains: dict[tuple[str, Way], list[float]] = {}
    rest: Exception | None = None
    try:
        for name, choice in (item for choices in told.values() for item in choices.items()):
            if (name, choice) not in alone:
                what = f"{bench.rows} {choice} {name} alone"
                alone[name, choice] = report.cell(what, partial(bench.alone, choice, name))
        for _ in range(ROUNDS):
            for label, choices in told.items():
                for number, way in enumerate(ways_of(bench.rows, label, choices)):
                    if way:
                        what = f"{bench.rows} {label} way {number}"
                        us = report.cell(what, partial(bench.chain, choices, way))
                        chains.setdefault((label, way), []).append(us)
    except OutOfTimeError as error:
        rest = error
    if not chains and rest:
        raise rest
    report.title(f"{bench.rows} rows", ("waiting", "before it", "first", *SHAPES, "alone"))
    nothing = [float("nan")]
    for label, choices in told.items():
        each = [alone.get(item, nothing[0]) for item in choices.items()]
        ways = [
            chains.get((label, way), nothing) if way else nothing
            for way in ways_of(bench.rows, label, choices)
        ]
        report.line(label, [*map(wrong_or_median, ways), *each, sum(map(abs, each))])
    spreads = [max(us) - min(us) for us in chains.values()]
    apart = f"{statistics.median(spreads):.1f} in the median, {max(spreads):.1f} at most"
    print(f"rounds of a chain are apart by {apart}", flush=True)
    if rest:
        raise rest


def wrong_or_median(rounds: list[float]) -> float:
    """A wrong result is negative."""
    return min(rounds) if min(rounds) < 0 else statistics.median(rounds)


def work(report: Report, all_rows: list[int], has_candidates: bool) -> None:
    asked = tried_by_triton if has_candidates else lambda *_: [ByTriton()]
    print(f"{compile_all(partial(walk, all_rows, asked), loads(all_rows))} kernels", flush=True)
    weights = [{name: random_weight(shape, CUDA) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    sums = torch.full((most_sums(loaded(all_rows)),), float("nan"), device=CUDA)
    arrived = torch.zeros(4096, dtype=torch.int32, device=CUDA)
    benches = [Bench(rows, weights, sums, arrived) for rows in all_rows]
    gc.freeze()  # a capture collects garbage, and what is here is none
    if has_candidates:
        for bench in benches:
            show_candidates(report, bench)
    else:
        show_all(report, benches, all_rows)
    report.title("all told")


def show_all(report: Report, benches: list[Bench], all_rows: list[int]) -> None:
    """Every table but that of candidates."""
    fastest = [show_chains(report, bench) for bench in benches]
    for bench in benches:
        show_alone(report, bench)
    for way in WAYS[:2]:
        for bench, found in zip(benches, fastest, strict=True):
            tried = candidates(bench.rows)
            show_places(report, bench, way, tried[found.get(way, "Triton")], tried)
    report.now.write_text("compiling the sweep")
    compile_all(partial(walk, all_rows, swept))
    for bench in benches:
        served = candidates(bench.rows)["Triton"]
        settings = {str(choice): choice for name in SHAPES for choice in swept(bench.rows, name)}
        tried = {
            label: {name: choice for name in SHAPES if choice in swept(bench.rows, name)}
            for label, choice in settings.items()
        }
        for way in WAYS[:2]:
            show_places(report, bench, way, served, tried)


def loads(all_rows: list[int]) -> list[Callable[[], object]]:
    found: list[Callable[[], object]] = [partial(load, kernel) for kernel in loaded(all_rows)]
    return [*found, *(partial(attention.load, row.variant) for row in attention.plan(ATTENTION))]


def loaded(all_rows: list[int]) -> list[Kernel]:
    return sorted({*kernels(all_rows), *served_kernels(all_rows)})


def walk(all_rows: list[int], asked: Callable[[int, str], Iterable[ByTriton]]) -> None:
    """Every kernel of Triton's, on meta tensors. `asked`: rows and linear -> settings."""
    weights = [{name: random_weight(shape, META) for name, shape in SHAPES.items()}]
    nothing = torch.empty(0, device=META)
    for rows in all_rows:
        bench = Bench(rows, weights, nothing, nothing)
        for is_first in (False, True):
            fp8.quantize_normed(bench.x, bench.x, bench.gain, EPS, early=is_first)
            fp8.quantize_normed(bench.x, bench.idle["o"], bench.gain, EPS, early=is_first)
            coded = fp8.quantize_rows(bench.x, early=is_first)
            gated = fp8.quantize_gated(bench.idle[WIDE], early=is_first)
        for name in SHAPES:
            for choice in asked(rows, name):
                bench.multiply(choice, name, 0, gated if name == "down" else coded)


def supervise(told: argparse.Namespace, deadline: float) -> None:
    """Processes until one comes to the end, or the time does."""
    with tempfile.TemporaryDirectory() as folder:
        now = Path(folder) / "now"
        without: list[str] = []
        while True:
            now.write_text("")
            command = [sys.executable, __file__, "--rows", told.rows, "--now", str(now)]
            command += ["--deadline", str(deadline), *(f"--without={what}" for what in without)]
            command += ["--candidates"] * told.candidates
            try:
                code = subprocess.run(command, timeout=max(1, deadline + 5 - time.time())).returncode
            except subprocess.TimeoutExpired:
                print("hung", now.read_text())
                return
            if code == 0 or time.time() > deadline:
                return
            without.append(now.read_text())
            print(f"DIED with {code} at `{without[-1]}`, and goes on without", flush=True)
            if not without[-1] or len(without) > 4:
                return


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--candidates", action="store_true", help="only these: fp8_assignments.py")
    parser.add_argument("--rows", help="default: 1,16,64, of candidates 1,16,32,64")
    parser.add_argument("--seconds", type=float, help="after which nothing is measured; 90, of candidates 60")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--now", type=Path, help="internal: the file that is told what is at work")
    parser.add_argument("--deadline", type=float, help="internal")
    parser.add_argument("--without", action="append", default=[], help="internal: what is left out")
    told = parser.parse_args()
    told.rows = told.rows or ("1,16,32,64" if told.candidates else "1,16,64")
    if told.list:
        room()
    elif told.now is None:
        supervise(told, time.time() + (told.seconds or (60 if told.candidates else 90)))
    else:
        try:
            report = Report(told.deadline, told.now, told.without)
            work(report, [int(rows) for rows in told.rows.split(",")], told.candidates)
        except OutOfTimeError:
            print("out of time")


if __name__ == "__main__":
    main()
