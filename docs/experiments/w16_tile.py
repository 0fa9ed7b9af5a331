"""16-bit gate_up of many rows with the gate: kernels/gated_linear beside cuBLAS and our gated_silu, alone and held.

python docs/experiments/w16_tile.py --out FOLDER [--rows 1024,896,1536,2048,4096,512] [--held 1024,896,2048]

Llama-3.1-8B's shapes in float16, weights rotated past the L2, dependent launches. Alone: microseconds of gate_up and the gate.
Held: also of a layer's four linears with the gate, each kept up under the card's power cap, there and back: microseconds,
joules, watts, MHz. Outputs are checked against float64 first, in sampled rows. Which numbers of rows plan.py has served is
marked. `--dry-run`: the same way on a CPU at small sizes, with the reference in the kernel's place.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from w16_algorithms import open_board
from w16_sustained import Contender, Cpu, Gpu, Launch, there_and_back, time_once

from service.kernels import gated_linear
from service.kernels.gated_silu import gated_silu

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
DRY_SHARE = 64  # by which a dry run divides
COPIES = 3  # of each weight: far more than the L2 holds
ROUNDS, HELD_SECONDS = 7, 0.6
LARGEST_ERROR = 6e-4  # relative, in norm
CUBLAS, OURS = "cuBLAS, gated_silu", "gated_linear"


class Problem:
    """Operands of up to `most` rows, and the launches of a contender."""

    def __init__(self, device: str, share: int, most: int) -> None:
        torch.manual_seed(1)
        self.shapes = {name: (n // share, k // share) for name, (n, k) in SHAPES.items()}
        widths = {k for _, k in self.shapes.values()}
        self.x = {k: torch.randn(most, k, device=device).half() for k in widths}
        self.weights = {
            name: [(torch.randn(n, k, device=device) / k**0.5).half() for _ in range(COPIES)]
            for name, (n, k) in self.shapes.items()
        }
        self.y = {name: torch.empty(most, n, device=device).half() for name, (n, _) in self.shapes.items()}
        self.gated = torch.empty(most, self.shapes["gate_up"][0] // 2, device=device).half()
        self.bound: list[Any] = []
        if device == "cuda":
            from service.kernels.gated_linear.cuda import Bound

            self.bound = [Bound(w, gated_linear.Variant(0)) for w in self.weights["gate_up"]]

    def linear(self, name: str, copy: int, rows: int) -> None:
        w = self.weights[name][copy]
        torch.mm(self.x[w.shape[1]][:rows], w.t(), out=self.y[name][:rows])

    def both(self, who: str, copy: int, rows: int) -> None:
        """gate_up and the gate; down_proj's input is written by whoever makes it."""
        w = self.weights["gate_up"][copy]
        x, y = self.x[w.shape[1]][:rows], self.gated[:rows]
        if who == CUBLAS:
            self.linear("gate_up", copy, rows)
            gated_silu(self.y["gate_up"][:rows])
        elif self.bound:
            self.bound[copy].write(x, y)
        else:
            y.copy_(gated_linear.gated_linear(x, w))

    def layer(self, who: str, copy: int, rows: int) -> None:
        for name in SHAPES:
            if name == "gate_up":
                self.both(who, copy, rows)
            else:
                self.linear(name, copy, rows)

    def error(self, rows: int) -> float:
        """Of every 21st row of ours."""
        self.gated.fill_(float("nan"))
        self.both(OURS, 0, rows)
        w = self.weights["gate_up"][0]
        few = self.x[w.shape[1]][5:rows:21].double()
        gate, up = torch.cat([few @ part.double().t() for part in w.split(4096)], dim=1).chunk(2, -1)
        want = F.silu(gate) * up
        return float((self.gated[5:rows:21].double() - want).norm() / want.norm())

    def is_served(self, rows: int) -> bool:
        return bool(self.bound) and rows in self.bound[0].served


def contender(machine: Gpu | Cpu, who: str, do: Any, rows: int) -> Contender:
    """A graph of one call for each copy of the weights."""
    calls: list[Launch] = [partial(do, who, copy, rows) for copy in range(COPIES)]
    for call in calls:
        call()
    machine.synchronize()
    return Contender(who, machine.capture(calls), COPIES)


def measure_alone(machine: Gpu | Cpu, problem: Problem, rows: int) -> dict[str, Any]:
    error = problem.error(rows)
    machine.synchronize()
    us: dict[str, list[float]] = {CUBLAS: [], OURS: []}
    graphs = [contender(machine, who, problem.both, rows) for who in us]
    for _ in range(ROUNDS):
        for one in graphs:
            us[one.name].append(time_once(machine, one.graph) / COPIES)
    told = {who: statistics.median(each) for who, each in us.items()}
    mark = "served" if problem.is_served(rows) else ""
    wrong = "" if error <= LARGEST_ERROR else f"  WRONG {error:.1e}"
    print(f"{rows:5} {told[CUBLAS]:8.1f} {told[OURS]:8.1f}  {mark}{wrong}", flush=True)
    return {"rows": rows, "us": told, "error": error, "served": bool(mark)}


def measure_held(machine: Gpu | Cpu, board: Any, problem: Problem, rows: int) -> list[dict[str, Any]]:
    found = []
    for what, do in (("gate_up", problem.both), ("layer", problem.layer)):
        contenders = [contender(machine, who, do, rows) for who in (CUBLAS, OURS)]
        for told in there_and_back(
            machine, board, contenders, HELD_SECONDS if machine.name == "cuda" else 0.05
        ):
            found.append({"rows": rows, "what": what} | told)
            each = ", ".join(f"{us:.1f}" for us in told["each_us"])
            print(
                f"{rows:5} {what:>7} {told['us']:7.1f} us {told['joules'] * 1e3:7.1f} mJ {told['watts']:5.0f} W "
                f"{told['mhz']:5.0f} MHz  {told['name']} ({each})",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for w16_tile.json")
    parser.add_argument("--rows", default="1024,768,896,1280,1536,2048,4096,8192,512,640")
    parser.add_argument("--held", default="1024,896,1536,2048,4096", help="of these, at most as many rows")
    parser.add_argument("--seconds", type=float, default=80, help="after which nothing new is begun")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    all_rows, held = ([int(n) for n in text.split(",") if n] for text in (arguments.rows, arguments.held))
    machine: Gpu | Cpu = Cpu() if arguments.dry_run else Gpu()
    board = None if arguments.dry_run else open_board()
    problem = Problem(machine.name, DRY_SHARE if arguments.dry_run else 1, max(all_rows + held))
    machine.synchronize()  # what follows is on a stream of its own
    report: dict[str, list[Any]] = {"alone": [], "held": []}
    gc.disable()  # what it frees inside a capture would spoil it
    with machine.on_stream(), board or nullcontext():
        print(f"alone, microseconds\n rows {CUBLAS[:6]:>8} {'ours':>8}")
        for rows in all_rows:
            if time.monotonic() < end:
                report["alone"].append(measure_alone(machine, problem, rows))
        print("held")
        for rows in held:
            if time.monotonic() < end:
                report["held"] += measure_held(machine, board, problem, rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "w16_tile.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
