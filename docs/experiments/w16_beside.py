"""A mixed step's layer in two arrangements: all kernels in a row, or decodes' attention beside prompts' gate_up.

python docs/experiments/w16_beside.py --out FOLDER [--seconds 80] [--decodes 256] [--prompts 384,384]

Llama-3.1-8B's shapes in float16. Decodes' attention is bound by memory and leaves the tensor cores idle; a product of many
rows is bound by them and leaves memory idle. Beside each other they must share the multiprocessors: the product is given
`n` of them (cublasLt by its SM_COUNT_TARGET, kernels/gated_linear by its number of blocks), attention takes what is left.

    norm, qkv, rotary, prompts' attention, o and norm of prompts --> gate_up of prompts (n multiprocessors) --> join
                                                               '--> decodes' attention (the others) ---------^
    o, norm and gate_up of decodes --> down of all rows

Alone: microseconds of the pair, for each n. Held: whole layers replayed for a while, so that the clock is what the board's
power allows: microseconds, joules. `--dry-run`: the same way on a CPU at small sizes, without what only a GPU has.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from w16_algorithms import open_board
from w16_cublaslt import WORKSPACE_BYTES, CublasLtError, Library, loaded_library
from w16_step import Arrangements, ByLt, ByTile, Copy, Layer, Problem, Sizes, Way, by_torch
from w16_sustained import Board, Contender, Cpu, Gpu, there_and_back, time_once

SHARES = (116, 108, 100, 92, 84)  # multiprocessors of a product; 132 in all
ROUNDS = 7
HELD_SECONDS = 1.0
LARGEST_ERROR = 3e-3  # of a layer's results beside those of the served arrangement, relative, in norm


@dataclass
class Report:
    pairs: list[dict[str, Any]] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    held: list[dict[str, Any]] = field(default_factory=list)


def measure_pairs(made: Arrangements, ways: Sequence[Way], report: Report, left: Callable[[], float]) -> None:
    """Attention and gate_up of prompts: one after the other, and beside each other."""
    p = made.problem
    qkv = torch.randn(p.rows, p.sizes.qkv, device=p.device).half()
    x = torch.randn(p.rows - p.decodes, p.sizes.hidden, device=p.device).half()
    many = slice(p.decodes, None)
    kinds: list[tuple[str, Callable[[Copy], Any]]] = [("attention", lambda copy: p.attend_decodes(copy, qkv))]
    for way in ways:
        alone = partial(made.gate_up, x=x, rows=many, linear=way.limited, gates=way.gates)
        kinds += [
            (f"{way.name}, alone", alone),
            (way.name, lambda copy, way=way: made.pair(way, copy, qkv, x)),
        ]
    timed: dict[str, list[float]] = {}
    graphs: dict[str, Any] = {}
    for name, do in kinds:
        if left() > 0:
            try:
                graphs[name] = made.capture(do)
            except (CublasLtError, IndexError) as error:  # no algorithm for so many multiprocessors
                print(f"  {name}: {error}")
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            timed.setdefault(name, []).append(time_once(made.machine, graph) / len(p.copies))
    us = {name: statistics.median(values) for name, values in timed.items()}
    print(f"attention alone {us['attention']:.1f} us; gate_up of {p.rows - p.decodes} rows:")
    for way in ways:
        if way.name in us and f"{way.name}, alone" in us:
            told = {"name": way.name, "alone_us": us[f"{way.name}, alone"], "pair_us": us[way.name]}
            report.pairs.append(told)
            print(f"  {way.name:28} alone {told['alone_us']:7.1f}  beside attention {told['pair_us']:7.1f}")


def check(made: Arrangements, way: Way, arrange: Callable[[Way, Copy], Layer]) -> float:
    """Its largest difference from what is served, relative, in norm: residual stream and what is added to it."""
    copy = made.problem.copies[1]
    want = whole(made.in_a_row(Way("served", by_torch, by_torch), copy))
    made.machine.synchronize()
    made.problem.out.fill_(float("nan"))
    made.problem.gated.fill_(float("nan"))
    found = whole(arrange(way, copy))
    made.machine.synchronize()
    errors = [
        float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, want, strict=True)
    ]
    return max(errors, key=lambda error: error if error == error else float("inf"))


def whole(layer: Layer) -> tuple[Tensor, Tensor]:
    return torch.cat(layer[0]), layer[1]


def measure_layers(made: Arrangements, chosen: Sequence[Way], board: Board | None, report: Report) -> None:
    served = Way("served", by_torch, by_torch)
    kinds = [(served.name, served, made.in_a_row)]
    kinds += [(f"{way.name}, in a row", way, made.in_a_row) for way in chosen if way.gates][:1]
    kinds += [(f"{way.name}, beside", way, made.beside) for way in chosen]
    contenders = []
    for name, way, arrange in kinds:
        error = report.errors[name] = check(made, way, arrange)
        if not error <= LARGEST_ERROR:
            print(f"WRONG {name}: {error:.1e}")
            continue
        graph = made.capture(partial(arrange, way))
        once = statistics.median(time_once(made.machine, graph) for _ in range(ROUNDS)) / len(
            made.problem.copies
        )
        print(f"  {name:40} once {once:7.1f} us, error {error:.1e}", flush=True)
        contenders.append(Contender(name, graph, len(made.problem.copies), way))
    seconds = HELD_SECONDS if isinstance(made.machine, Gpu) else 0.05
    report.held = there_and_back(made.machine, board, contenders, seconds)
    for told in report.held:
        print(f"  {told['name']:40} held {told['us']:7.1f} us {told['joules'] * 1e3:7.1f} mJ {told['watts']:5.0f} W "
              f"{told['mhz']:5.0f} MHz")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=80, help="after which no pair is begun")
    parser.add_argument("--decodes", type=int, default=256)
    parser.add_argument("--prompts", default="384,384", help="rows of each prompt")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [int(rows) for rows in arguments.prompts.split(",")]
    report, board = Report(), None
    ways = [Way("torch", by_torch, by_torch)]
    machine: Gpu | Cpu
    if arguments.dry_run:
        machine = Cpu()
        problem = Problem("cpu", Sizes(64, 4, 2, 16, 96, 40, 2), 5, [24, 17])
    else:
        machine, board = Gpu(), open_board()
        machine.stream = torch.cuda.Stream(priority=-1)  # the product's blocks go before attention's
        problem = Problem("cuda", Sizes(), arguments.decodes, prompts)
        by_torch(problem.hidden, problem.copies[0].weights["o"], torch.empty_like(problem.hidden))
        machine.synchronize()  # what follows is on a stream of its own
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
        library = Library(loaded_library())
        ways += [Way(f"cublasLt {n}", ByLt(library, machine, workspace, n), by_torch) for n in SHARES]
        weights = [copy.weights["gate_up"] for copy in problem.copies]
        free = ByTile(weights, 0)
        ways += [Way(f"gated_linear {n}", ByTile(weights, n), free, gates=True) for n in SHARES]
    gc.disable()  # what it frees inside a capture would spoil it
    with machine.on_stream():
        measure_pairs(made := Arrangements(problem, machine), ways, report, lambda: end - time.monotonic())
        fastest = sorted(report.pairs[1:] or report.pairs, key=lambda pair: pair["pair_us"])
        chosen = [way for pair in fastest for way in ways if way.name == pair["name"]]
        of_lt, of_tile = ([way for way in chosen if way.gates == gates][:2] for gates in (False, True))
        with board or nullcontext():
            measure_layers(made, of_lt + of_tile, board, report)
    (folder / "w16_beside.json").write_text(json.dumps(asdict(report), indent=1))


if __name__ == "__main__":
    main()
