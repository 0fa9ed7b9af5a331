"""E4M3 linears of few rows: w8_tile's variants against Triton and torch's scaled matmul, for the table.

gpu_kernels --only fp8 --rows 1,4,8,16,32,48,64,96,128 --> microseconds of each of a layer's four linears

Weights are rotated past the L2 cache, launches depend on each other as when serving, and every variant's
result is held against Triton's or torch's. `quantize` is what makes the codes of a layer's four inputs,
`chain` all of it as a layer launches it: `light` is the table's variant without moving registers, so that
blocks of two launches fit beside each other, `deep` with all the stages that there is room for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from service.engine.kernels_ahead import META, compile_all
from service.kernels import w8_linear
from service.kernels.fp8_linear import triton as fp8
from service.kernels.fp8_linear.plan import FEW_ROWS
from service.kernels.fp8_linear.reference import quantize_rows
from service.kernels.w8_linear import FewRows, Shape, plan
from service.kernels.w8_linear.cuda import Call, Weight, Workspace
from service.kernels.w8_linear.plan import Settings
from service.kernels.w8_linear.variants import SHARED_BYTES, SYSTEM_BYTES, Tile
from tests.benchmarks.gpu_timing import CUDA, HIDDEN, INNER, QKV, microseconds

SHAPES = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
ROTATED_BYTES = 256 << 20
LAUNCHES = 24  # in a graph
CHAINED = 2  # layers' weights, 436 MB
MOST_STAGES = 12  # of the kernel
LARGEST_DIFFERENCE = 4e-3  # of two roundings to bfloat16
TORCH_ROWS = 32  # from which on torch's product is of interest
# by the most rows that they are tried with
TRIED = (
    (
        16,
        (
            Settings(16, 1, 10, cuts=True),
            Settings(16, 1, 12, cuts=True),
            Settings(16, 1, 10),
            Settings(16, 2, 6),
        ),
    ),
    (
        32,
        (
            Settings(32, 1, 9, cuts=True),
            Settings(32, 1, 11, cuts=True),
            Settings(32, 1, 9),
            Settings(32, 2, 5),
            Settings(32, 2, 6),
        ),
    ),
    (
        64,
        (
            Settings(64, 1, 8, cuts=True),
            Settings(64, 1, 9, cuts=True),
            Settings(64, 1, 8),
            Settings(64, 2, 5),
        ),
    ),
    (
        128,
        (
            Settings(128, 1, 6, cuts=True),
            Settings(128, 1, 6),
            Settings(128, 2, 4),
            Settings(64, 1, 8, cuts=True),
        ),
    ),
)


@dataclass(frozen=True)
class Linear:
    """One of a layer's, and copies of its weight."""

    name: str
    weights: list[Weight]

    @property
    def shape(self) -> Shape:
        return Shape("fp8", *SHAPES[self.name], torch.bfloat16)


def variant_of(settings: Settings) -> Tile:
    return Tile("fp8", 1, *settings)


def tried_with(rows: int) -> tuple[Settings, ...]:
    return next((tried for most, tried in TRIED if rows <= most), ())


def name_of(settings: Settings) -> str:
    tile = variant_of(settings)
    return f"{tile.outputs} x {tile.tile}, {tile.stages} stages{', cut' if tile.cuts else ''}"


def linear_of(name: str, device: torch.device) -> Linear:
    outs, width = SHAPES[name]
    copies = max(3, ROTATED_BYTES // (outs * width)) if device == CUDA else 1
    weights = []
    for _ in range(copies):
        if device == CUDA:
            codes, scales = quantize_rows(
                torch.randn(outs, width, device=device, dtype=torch.bfloat16) * 0.05
            )
        else:
            codes = torch.empty(outs, width, dtype=torch.float8_e4m3fn, device=device)
            scales = torch.empty(outs, device=device)
        weights.append(Weight(codes, scales, None))
    return Linear(name, weights)


def inputs_of(rows: int, device: torch.device) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    """Linear -> what makes its rows' codes."""
    given = {"dtype": torch.bfloat16, "device": device}
    hidden, delta = (torch.empty(rows, HIDDEN, **given).normal_() for _ in range(2))
    gate_up, gain = torch.empty(rows, 2 * INNER, **given).normal_(), torch.ones(HIDDEN, **given)

    def normed() -> tuple[Tensor, Tensor]:
        return fp8.quantize_normed(hidden, delta, gain, 1e-5)[1]

    plain = partial(fp8.quantize_rows, hidden)
    return {"qkv": normed, "o": plain, "gate_up": normed, "down": partial(fp8.quantize_gated, gate_up)}


def products(
    rows: int, linear: Linear, coded: tuple[Tensor, Tensor], workspace: Workspace
) -> dict[str, Callable[[int], Tensor]]:
    """Who multiplies -> a launch with one of the weights."""
    x = coded[0].new_empty(rows, SHAPES[linear.name][1], dtype=torch.bfloat16)
    weights = linear.weights

    def by_torch(i: int) -> Tensor:
        weight = weights[i % len(weights)]
        steps = coded[1][:, None], weight.steps[None, :]
        y: Tensor = torch._scaled_mm(coded[0], weight.codes.t(), *steps, out_dtype=torch.bfloat16)
        return y

    def by_triton(i: int) -> Tensor:
        weight = weights[i % len(weights)]
        return fp8.few_rows(x, *coded, weight.codes, weight.steps, None)

    def by_tile(i: int, calls: list[Call]) -> Tensor:
        y = x.new_empty(rows, SHAPES[linear.name][0])
        calls[i % len(calls)](*coded, None, y)
        return y

    found: dict[str, Callable[[int], Tensor]] = {}
    if rows <= FEW_ROWS:
        found["Triton"] = by_triton
    if rows >= TORCH_ROWS or rows > FEW_ROWS:
        found["torch._scaled_mm"] = by_torch
    for settings in tried_with(rows):
        variant = variant_of(settings)
        calls = [Call(weight, None, variant, workspace) for weight in weights]
        found[name_of(settings)] = partial(by_tile, calls=calls)
    for kind, variant in chained(rows, linear).items() if rows <= w8_linear.MOST_FP8_ROWS else ():
        calls = [Call(weight, None, variant, workspace) for weight in weights]
        found[f"table, {kind}"] = partial(by_tile, calls=calls)
    return found


def deepest(variant: Tile) -> Tile:
    """With as many stages as there is room for."""
    deeper = replace(variant, stages=variant.stages + 1)
    is_room = deeper.stages <= MOST_STAGES and deeper.shared_bytes <= SHARED_BYTES - SYSTEM_BYTES
    return deepest(deeper) if is_room else variant


def chained(rows: int, linear: Linear) -> dict[str, Tile]:
    """What the table has for it, and two other ways to make room, of registers and of stages."""
    variant = next(row.variant for row in plan(linear.shape) if rows <= (row.max_rows or rows))
    light = replace(variant, light=True)
    return {"tiles": replace(variant, light=False), "light": light, "light and deep": deepest(light)}


def chain(rows: int, linears: list[Linear], workspace: Workspace, kind: str) -> float:
    """A layer's rows and products; every kernel awaits the one before."""
    inputs = inputs_of(rows, CUDA)
    x = torch.empty(rows, HIDDEN, device=CUDA, dtype=torch.bfloat16)

    def few_of(linear: Linear, weight: Weight) -> FewRows | None:
        if kind == "Triton":
            return None
        call = Call(weight, None, chained(rows, linear)[kind], workspace)

        def multiply(codes: Tensor, scales: Tensor) -> Tensor:
            y = codes.new_empty(rows, linear.shape.out_features, dtype=torch.bfloat16)
            call(codes, scales, None, y)
            return y

        return FewRows(rows, multiply)

    copies = [linear.weights[:CHAINED] for linear in linears]
    few = [[few_of(linear, w) for w in linear.weights[:CHAINED]] for linear in linears]

    def layer(i: int) -> None:
        for number, make in enumerate(inputs.values()):
            weight = copies[number][i % CHAINED]
            fp8.multiply(x, *make(), weight.codes, weight.steps, None, few[number][i % CHAINED])

    return microseconds(layer, 8)


def walk(all_rows: list[int]) -> None:
    """Every kernel of Triton's, on meta tensors."""
    linears = [linear_of(name, META) for name in SHAPES]
    for rows in all_rows:
        inputs = inputs_of(rows, META)
        for linear in linears:
            coded = inputs[linear.name]()
            if rows <= FEW_ROWS:
                weight, x = linear.weights[0], torch.empty(rows, 16, dtype=torch.bfloat16, device=META)
                fp8.few_rows(x, *coded, weight.codes, weight.steps, None)


def run(all_rows: list[int]) -> None:
    """Prints a block for each number of rows."""
    variants = {variant_of(settings) for rows in all_rows for settings in tried_with(rows)}
    linears = [linear_of(name, CUDA) for name in SHAPES]
    for rows in all_rows:
        if rows <= w8_linear.MOST_FP8_ROWS:
            variants |= {variant for linear in linears for variant in chained(rows, linear).values()}
    programs = {variant.program: variant for variant in variants}
    loads = [partial(w8_linear.load, variant) for variant in programs.values()]
    print(f"{compile_all(partial(walk, all_rows), loads)} kernels", flush=True)
    workspace = Workspace(CUDA, "fp8")
    most = max(variant.sums_of_block for variant in variants)
    workspace.sums = torch.empty(workspace.blocks * most, device=CUDA)
    head = "".join(f"{name:>10}" for name in SHAPES)
    print(f"{'rows':>5}  {'microseconds':28}{head}{'a layer':>10}")
    for rows in all_rows:
        show_rows(rows, linears, workspace)


def show_rows(rows: int, linears: list[Linear], workspace: Workspace) -> None:
    inputs = inputs_of(rows, CUDA)
    made = [microseconds(lambda _, make=make: make(), LAUNCHES) for make in inputs.values()]
    lines: dict[str, list[tuple[float, str]]] = {"quantize": [(taken, " ") for taken in made]}
    for linear in linears:
        coded = inputs[linear.name]()
        found = products(rows, linear, coded, workspace)
        want = next(iter(found.values()))(0).double()
        for name, multiply in found.items():
            is_right = (multiply(0).double() - want).norm() <= LARGEST_DIFFERENCE * want.norm()
            taken = microseconds(multiply, LAUNCHES)
            lines.setdefault(name, []).append((taken, " " if is_right else "!"))
    for name, taken in lines.items():
        cells = "".join(f"{us:9.2f}{mark}" for us, mark in taken)
        print(f"{rows:5d}  {name:28}{cells}{sum(us for us, _ in taken):9.1f}")
    tried = [found for name, found in lines.items() if " x " in name]
    told = []
    if tried:
        told.append(f"best {sum(min(us for us, _ in column) for column in zip(*tried, strict=True)):.1f}")
    if rows <= w8_linear.MOST_FP8_ROWS:
        kinds = ("Triton", *chained(rows, linears[0]))
        told += [f"chain {kind} {chain(rows, linears, workspace, kind):.1f}" for kind in kinds]
    assert not workspace.arrived.any()
    print(f"{rows:5d}  {', '.join(told)}; wrong ones have a !", flush=True)
