"""fp8's linears of few rows behind the kernels that make their rows: who serves, held against others, on an H100.

python docs/experiments/fp8_chain.py [--rows 1,16,32,64]

A chain is 8 layers of Llama-3.1-8B in one CUDA graph, launched dependently as a decode step launches them: rows of the norm,
qkv, attention over 640 tokens, its rows, o, rows of the norm, gate_up, rows of the gate, down. Each has weights of its own,
1.7 GB in all. Chains are timed ROUNDS times in turn; then each linear alone, behind itself in a graph of 16. Of the last layer
every product is held against float64 in 64 outputs, as the graph has left it: what is wrong is told by a !.

Microseconds a layer. To try another assignment, add its table; Triton's settings are those of fp8_linear/plan.py.
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from graph_times import replays_us
from torch import Tensor
from w8_variants import SHAPES

from service.engine.kernels_ahead import META, compile_all
from service.kernels import decode_attention as attention
from service.kernels import w8_linear
from service.kernels.fp8_linear import triton as fp8
from service.kernels.fp8_linear.reference import quantize_rows
from service.kernels.w8_linear import FewRows, Shape, bind_fp8, plan, refusal
from service.kernels.w8_linear.cuda import workspace_on
from service.kernels.w8_linear.plan import TABLES, Settings, Table
from tests.kernels.decodes import decodes

CUDA = torch.device("cuda", 0)
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CONTEXT, EPS = 4096, 32, 8, 128, 640, 1e-5
ATTENTION = attention.Shape(HEAD_DIM, HEADS, KV_HEADS, torch.bfloat16, torch.bfloat16)
LAYERS, ROUNDS, REPEATS, SAMPLED = 8, 3, 12, 64
LARGEST_ERROR = 3e-3  # relative, in norm, with the rounding to bfloat16, which is 1.7e-3


Places = tuple[Settings | None, Settings | None, Settings | None]


def tiles_in(narrow: bool = False, deep: bool = False, wide: bool = False) -> Table:
    """w8_tile.cu for qkv and o, for down, for gate_up; the rest is Triton's."""

    def settings(tile: int, stages: int, wide_stages: int) -> Places:
        some, most = Settings(tile, 1, stages, cuts=True), Settings(tile, 2, wide_stages)
        return some if narrow else None, some if deep else None, most if wide else None

    return (16, settings(16, 10, 6)), (32, settings(32, 9, 5)), (64, settings(64, 8, 5))


TORCH = "torch._scaled_mm"
EVERYWHERE = tiles_in(narrow=True, deep=True, wide=True)
ASSIGNMENTS: dict[str, Table] = {
    "as served": TABLES["fp8"],
    "Triton": tiles_in(),
    "tiles gate_up": tiles_in(wide=True),
    "tiles gate_up down": tiles_in(deep=True, wide=True),
    "tiles": EVERYWHERE,
    TORCH: tiles_in(),
}


@dataclass(frozen=True, eq=False)
class Linear:
    """A weight, and by assignment what w8_tile.cu serves of it."""

    codes: Tensor  # float8_e4m3fn [out, in]
    steps: Tensor  # float32 [out]
    few: dict[str, FewRows | None]


@dataclass(frozen=True)
class Product:
    linear: Linear
    codes: Tensor
    steps: Tensor
    y: Tensor

    def is_right(self) -> bool:
        """In the last output and some others."""
        outputs = torch.randint(len(self.linear.codes), (SAMPLED,), device=self.y.device)
        outputs[0] = len(self.linear.codes) - 1
        # as bytes: torch does not gather E4M3
        some = self.linear.codes.view(torch.int8)[outputs].view(torch.float8_e4m3fn).double()
        x = self.codes.double() * self.steps.double()[:, None]
        want = x @ (some * self.linear.steps[outputs].double()[:, None]).t()
        return bool((self.y[:, outputs].double() - want).norm() <= LARGEST_ERROR * want.norm())


class Bench:
    """So many rows, and what a decode step does with them."""

    def __init__(self, rows: int, weights: list[dict[str, Linear]]) -> None:
        self.rows, self.weights = rows, weights
        device = weights[0]["o"].codes.device
        self.x = torch.empty(rows, HIDDEN, device=device, dtype=torch.bfloat16)
        self.gain = torch.ones(HIDDEN, device=device, dtype=torch.bfloat16)
        if device != META:
            self.x.normal_()
            self.decode = decodes(ATTENTION, [CONTEXT] * rows, device=device)
            self.caches = [(self.decode.keys.clone(), self.decode.values.clone()) for _ in range(LAYERS)]

    def multiply(self, label: str, linear: Linear, coded: tuple[Tensor, Tensor]) -> Tensor:
        if label != TORCH:
            return fp8.multiply(self.x, *coded, linear.codes, linear.steps, None, linear.few[label])
        scales = coded[1][:, None], linear.steps[None, :]
        y: Tensor = torch._scaled_mm(coded[0], linear.codes.t(), *scales, out_dtype=torch.bfloat16)
        return y

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        if qkv.is_meta:
            return self.x
        step = self.decode.step
        variant = attention.serving(ATTENTION, step)
        assert variant is not None, "no attention of ours serves here"
        rotary = self.decode.cos, self.decode.sin, None, None, EPS
        y = attention.decode_attention(variant, qkv, *rotary, *self.caches[layer], step, HEAD_DIM**-0.5)
        return y.view(self.rows, HIDDEN)

    def layers(self, label: str) -> list[Product]:
        """-> the products of the last."""
        hidden, delta = self.x, self.x
        products: list[Product] = []
        for layer, weights in enumerate(self.weights):
            products.clear()  # so that memory is taken again, as in a decode step

            def multiply(linear: Linear, coded: tuple[Tensor, Tensor]) -> Tensor:
                y = self.multiply(label, linear, coded)
                products.append(Product(linear, *coded, y))
                return y

            hidden, coded = fp8.quantize_normed(hidden, delta, self.gain, EPS)
            attended = self.attend(multiply(weights["qkv"], coded), layer)
            delta = multiply(weights["o"], fp8.quantize_rows(attended))
            hidden, coded = fp8.quantize_normed(hidden, delta, self.gain, EPS)
            delta = multiply(weights["down"], fp8.quantize_gated(multiply(weights["gate_up"], coded)))
        return products

    def chain(self, label: str) -> float:
        """Microseconds a layer; negative where a result is wrong."""
        us, products = graph_us(partial(self.layers, label))
        return us / LAYERS if right(products) else -us / LAYERS

    def alone(self, label: str, name: str) -> float:
        """Microseconds of a linear behind itself, likewise."""
        x = torch.randn(self.rows, SHAPES[name][1], device=self.x.device, dtype=torch.bfloat16)
        coded = fp8.quantize_rows(x)

        def run() -> list[Product]:
            linears = [weights[name] for weights in self.weights] * 2
            return [Product(linear, *coded, self.multiply(label, linear, coded)) for linear in linears]

        us, products = graph_us(run)
        return us / len(products) if right(products[-1:]) else -us / len(products)


def graph_us(run: Callable[[], Any]) -> tuple[float, Any]:
    """Median microseconds, and what the captured run gave, as the last replay has left it."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        given = run()
    return statistics.median(replays_us(graph, REPEATS)), given


def right(products: Iterable[Product]) -> bool:
    """And no block left a count behind."""
    return all(each.is_right() for each in products) and not workspace_on(CUDA, "fp8").arrived.any()


def random_linear(shape: tuple[int, int]) -> Linear:
    codes, steps = quantize_rows(torch.randn(shape, device=CUDA, dtype=torch.bfloat16) * 0.02)
    asked = Shape("fp8", *shape, torch.bfloat16)
    few: dict[str, FewRows | None] = {}
    for label, table in ASSIGNMENTS.items():
        TABLES["fp8"] = table
        few[label] = None if refusal(asked) else bind_fp8(codes, steps, asked)
    return Linear(codes, steps, few)


def walk(all_rows: list[int]) -> None:
    """Every kernel of Triton's, on meta tensors."""
    nobody = dict.fromkeys(ASSIGNMENTS)
    weights = {
        name: Linear(
            torch.empty(shape, dtype=torch.float8_e4m3fn, device=META),
            torch.empty(shape[0], device=META),
            nobody,
        )
        for name, shape in SHAPES.items()
    }
    for rows in all_rows:
        Bench(rows, [weights] * 2).layers("Triton")


def loads() -> list[Callable[[], object]]:
    """Under the table that has every variant."""
    variants = {
        row.variant for shape in SHAPES.values() for row in plan(Shape("fp8", *shape, torch.bfloat16))
    }
    return [
        *(partial(w8_linear.load, variant) for variant in variants),
        *(partial(attention.load, row.variant) for row in attention.plan(ATTENTION)),
    ]


def show(bench: Bench) -> None:
    chains: dict[str, list[float]] = {label: [] for label in ASSIGNMENTS}
    for _ in range(ROUNDS):
        for label, rounds in chains.items():
            rounds.append(bench.chain(label))
    print("".join(f"{told!s:>10}" for told in (f"{bench.rows} rows".ljust(20), "chain", *SHAPES, "alone")))
    for label, rounds in chains.items():
        alone = [bench.alone(label, name) for name in SHAPES]
        cells = min(rounds) if min(rounds) < 0 else statistics.median(rounds), *alone, sum(map(abs, alone))
        print(f"{label:20}" + "".join(f"{abs(us):9.1f}{'!' if us < 0 else ' '}" for us in cells), flush=True)
    spreads = [max(rounds) - min(rounds) for rounds in chains.values()]
    print(
        f"rounds apart by {statistics.median(spreads):.1f} in the median, {max(spreads):.1f} at most\n",
        flush=True,
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", default="1,16,32,64", help="up to 64 each; default: %(default)s")
    all_rows = [int(rows) for rows in parser.parse_args().rows.split(",")]
    TABLES["fp8"] = EVERYWHERE
    workspace = workspace_on(CUDA, "fp8")  # kept, with room for the largest variant
    workspace.sums.fill_(float("nan"))
    print(f"{compile_all(partial(walk, all_rows), loads())} kernels\n", flush=True)
    weights = [{name: random_linear(shape) for name, shape in SHAPES.items()} for _ in range(LAYERS)]
    gc.freeze()  # a capture collects garbage, and what is here is none
    for rows in all_rows:
        show(Bench(rows, weights))


if __name__ == "__main__":
    main()
