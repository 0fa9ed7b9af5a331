"""Llama-3.1-8B's linears in float16 by torch or by an algorithm of cublasLt: launched, checked, timed alone.

w16_algorithms.py decides which and when; here lie the operands, and what is known of each way to multiply.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from w16_cublaslt import WORKSPACE_BYTES, Algorithm, CublasLtError, Library, Product
from w16_sustained import Contender, Cpu, Gpu, time_once

LAUNCHES = {"qkv": 8, "o": 12, "gate_up": 2, "down": 4}  # in a graph: 0.3 to 0.7 ms at 1,024 rows
ROTATED_BYTES = 192 << 20
ROUNDS = 5
REST_SECONDS = 0.02  # between rounds, so that alone means at the highest clock
PARENTS, SHOWN = 3, 3
LAYERS = 4  # in a sustained graph
LARGEST_EXCESS = 1.25  # of an error, over torch's own


@dataclass
class Timed:
    """One way to multiply; `algorithm` None is torch.mm."""

    name: str
    algorithm: Algorithm | None
    us: float = math.nan
    ratio: float = math.nan  # of torch's time in the same rounds
    error: float = math.nan
    failed: str = ""
    right: bool = False


@dataclass
class Cell:
    shape: str
    rows: int
    timed: list[Timed]
    kernels: dict[str, str] = field(default_factory=dict)

    @property
    def torch(self) -> Timed:
        return self.timed[0]

    def best(self, count: int) -> list[Timed]:
        """The fastest that are right, torch apart."""
        return sorted((t for t in self.timed[1:] if t.right), key=lambda t: t.ratio)[:count]

    def line(self) -> str:
        told = "; ".join(f"{t.us:.1f} ({t.ratio - 1:+.1%}) {t.name}" for t in self.best(SHOWN))
        first = next((t for t in self.timed if t.name.endswith(" h0")), None)
        wrong = sum(bool(t.failed) or not t.right for t in self.timed)
        return (
            f"{self.shape:8}{self.rows:5} torch {self.torch.us:6.1f}  first {first.us if first else math.nan:6.1f} "
            f"of {len(self.timed) - 1:3} ({wrong} out) | {told}"
        )


class Bench:
    """Operands of all shapes on the device, and ways to launch products of them."""

    def __init__(
        self, machine: Gpu | Cpu, library: Library, shapes: dict[str, tuple[int, int]], most_rows: int
    ) -> None:
        self.machine, self.library, self.shapes = machine, library, shapes
        device = machine.name
        torch.manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.float16)

        self.x = {k: random(most_rows, k) for k in {k for _, k in shapes.values()}}
        self.weights: dict[str, list[Tensor]] = {}
        self.want: dict[str, Tensor] = {}
        self.y: dict[str, Tensor] = {}
        for name, (n, k) in shapes.items():
            copies = max(2, min(8, ROTATED_BYTES // (n * k * 2) + 1))
            self.weights[name] = [random(n, k) / k**0.5 for _ in range(copies)]
            self.want[name] = self.x[k].double() @ self.weights[name][0].double().t()
            self.y[name] = random(most_rows, n)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.products: dict[tuple[str, int], Product] = {}

    def product(self, name: str, rows: int) -> Product:
        if (name, rows) not in self.products:
            self.products[name, rows] = Product(self.library, rows, *self.shapes[name])
        return self.products[name, rows]

    def bind(self, name: str, w: Tensor, x: Tensor, algorithm: Algorithm | None) -> Callable[[], Any]:
        y = self.y[name][: len(x)]
        if algorithm is None:
            return partial(torch.mm, x, w.t(), out=y)
        pointers = (t.data_ptr() for t in (x, w, y))
        product = self.product(name, len(x))
        return product.bind(algorithm, *pointers, self.workspace.data_ptr(), self.machine.handle)

    def rows_of(self, name: str, rows: int) -> Tensor:
        return self.x[self.shapes[name][1]][:rows]

    def launches(self, name: str, rows: int, algorithm: Algorithm | None) -> list[Callable[[], Any]]:
        """Over other weights in turn; the last is of the first weight, whose product is known."""
        weights, x = self.weights[name], self.rows_of(name, rows)
        order = range(LAUNCHES[name] - 1, -1, -1)
        return [self.bind(name, weights[i % len(weights)], x, algorithm) for i in order]

    def capture(self, launches: Sequence[Callable[[], Any]]) -> Any:
        launches[0]()  # loads the kernel, and says what cannot be launched
        return self.machine.capture(launches)

    def error(self, name: str, rows: int) -> float:
        want = self.want[name][:rows]
        return float((self.y[name][:rows].double() - want).norm() / want.norm())

    def alone(self, name: str, rows: int, timed: list[Timed]) -> Cell:
        """Each in a graph of its own, round after round, every second round in reverse order."""
        y, graphs = self.y[name][:rows], {}
        for i, each in enumerate(timed):
            try:
                graphs[i] = self.capture(self.launches(name, rows, each.algorithm))
            except CublasLtError as error:
                each.failed = str(error)
                continue
            y.fill_(math.nan)
            graphs[i].replay()
            each.error = self.error(name, rows)
        times: dict[int, list[float]] = {i: [] for i in graphs}
        for number in range(ROUNDS):
            time.sleep(REST_SECONDS)
            for i in list(graphs)[:: -1 if number % 2 else 1]:
                times[i].append(time_once(self.machine, graphs[i]) / LAUNCHES[name])
        for i, graph in graphs.items():
            each = timed[i]
            each.us = statistics.median(times[i])
            each.ratio = each.us / statistics.median(times[0])
            y.fill_(math.nan)
            graph.replay()
            same = self.error(name, rows) == each.error
            each.right = same and each.error <= LARGEST_EXCESS * timed[0].error
            each.failed = "" if each.right else f"error {each.error:.1e}, the same twice: {same}"
        return Cell(name, rows, timed)

    def cell(self, name: str, rows: int, count: int) -> Cell:
        named = [Timed(self.library.name(a), a) for a in self.product(name, rows).heuristics(count)]
        return self.alone(name, rows, [Timed("torch", None), *named])

    def add_neighbours(self, cell: Cell, count: int) -> Cell:
        """With what the best ones become by one change, `count` of each; the best are timed once more beside them."""
        parents = [t.algorithm for t in cell.best(PARENTS) if t.algorithm]
        seen = {t.algorithm.data for t in cell.timed if t.algorithm}
        found = {parent.data: parent for parent in parents}
        for parent in parents:
            made = self.product(cell.shape, cell.rows).neighbours(parent)
            new = (each for each in made if each.data not in seen and each.data not in found)
            found |= {each.data: each for each in islice(new, count)}
        timed = [Timed("torch", None), *(Timed(self.library.name(a), a) for a in found.values())]
        again = self.alone(cell.shape, cell.rows, timed)
        again.timed += [t for t in cell.timed[1:] if t.algorithm and t.algorithm.data not in found]
        return again

    def layer(
        self, name: str, rows: int, chosen: dict[str, Algorithm | None], zeros: bool = False
    ) -> Contender:
        """Four linears, layer behind layer, in one graph."""
        xs = {shape: self.rows_of(shape, rows) for shape in self.shapes}
        if zeros:
            xs = {shape: torch.zeros_like(x) for shape, x in xs.items()}
        launches = [
            self.bind(shape, weights[i % len(weights)], xs[shape], chosen[shape])
            for i in range(LAYERS)
            for shape, weights in self.weights.items()
        ]
        for launch in launches[: len(self.shapes)]:
            launch()
        return Contender(name, self.machine.capture(launches), LAYERS, xs)

    def repeated(self, shape: str, rows: int, timed: Timed) -> Contender:
        graph = self.capture(self.launches(shape, rows, timed.algorithm))
        return Contender(timed.name, graph, LAUNCHES[shape])
