"""The work of one layer in a step of decodes and prompts, and its kernels in two arrangements: w16_beside.py times them.

Llama-3.1-8B's shapes in float16, with the kernels that serve; on a CPU, at small sizes, with those that serve there.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor
from w16_cublaslt import Algorithm, Library, Product
from w16_sustained import Cpu, Gpu

from service.kernels import decode_attention, launch
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.gated_linear import Variant
from service.kernels.gated_silu import gated_silu
from service.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention
from service.kernels.rotary_kv import rotary_kv

SM_COUNT_TARGET = 15  # cublasLtMatmulDescAttributes_t
PAGE, EPS = 16, 1e-5
Linear = Callable[[Tensor, Tensor, Tensor], None]  # x, w, y
Layer = tuple[list[Tensor], Tensor]  # the residual stream in parts, and what is to be added to it


@dataclass(frozen=True)
class Sizes:
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    inner: int = 14336
    context: int = 640  # tokens behind which each decode attends
    layers: int = 4  # with weights and pages of their own, far more than the L2 holds

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


@dataclass
class Copy:
    """A layer's tensors."""

    weights: dict[str, Tensor]
    keys: Tensor
    values: Tensor


class Problem:
    """What a step of `decodes` and of prompts of these lengths computes on, and what all arrangements share."""

    def __init__(self, device: str, sizes: Sizes, decodes: int, prompts: Sequence[int]) -> None:
        torch.manual_seed(1)
        self.sizes, self.decodes, self.rows = sizes, decodes, decodes + sum(prompts)
        self.device = device
        dtype = torch.float16

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        lengths = [sizes.context] * decodes + list(prompts)
        most = -(-max(lengths) // PAGE)
        num_blocks = 1 + len(lengths) * most
        tables = 1 + torch.randperm(num_blocks - 1).view(len(lengths), most)
        positions = [sizes.context - 1] * decodes
        sequences = list(range(decodes))
        starts = list(range(decodes + 1))
        for index, length in enumerate(prompts):
            positions += range(length)
            sequences += [decodes + index] * length
            starts.append(starts[-1] + length)
        at = torch.tensor(positions)
        slots = tables[torch.tensor(sequences), at // PAGE] * PAGE + at % PAGE
        self.positions, self.slots = at.to(device), slots.to(device)
        blocks = tables.to(device, torch.int32)
        self.plan = plan_attention(blocks, starts, lengths, decodes)
        self.decode_plan = (  # a CPU's kernels want lists
            plan_attention(blocks[:decodes], starts[: decodes + 1], lengths[:decodes], decodes)
            if device == "cpu"
            else self.plan.apart[0]
        )
        angles = torch.outer(torch.arange(max(lengths)), 5e5 ** (-torch.arange(0, 1, 2 / sizes.head_dim)))
        table = torch.cat((angles, angles), dim=1).to(device)
        self.cos, self.sin = table.cos(), table.sin()
        self.norm = torch.ones(sizes.hidden, device=device, dtype=dtype)
        self.hidden, self.delta = random(self.rows, sizes.hidden), random(self.rows, sizes.hidden)
        shapes = {
            "qkv": (sizes.qkv, sizes.hidden),
            "o": (sizes.hidden, sizes.heads * sizes.head_dim),
            "gate_up": (2 * sizes.inner, sizes.hidden),
            "down": (sizes.hidden, sizes.inner),
        }
        pages = (num_blocks, sizes.kv_heads, PAGE, sizes.head_dim)
        self.copies = [
            Copy(
                {name: random(n, k) / k**0.5 for name, (n, k) in shapes.items()},
                random(*pages),
                random(*pages),
            )
            for _ in range(sizes.layers)
        ]
        shape = decode_attention.Shape(
            sizes.head_dim, sizes.heads, sizes.kv_heads, dtype, dtype, is_normed=False
        )
        self.variant = decode_attention.serving(shape, self.plan)
        self.out = torch.zeros(self.rows, sizes.heads, sizes.head_dim, device=device, dtype=dtype)
        self.gate_up = random(self.rows, 2 * sizes.inner)
        self.gated = random(self.rows, sizes.inner)

    @property
    def scale(self) -> float:
        return float(self.sizes.head_dim**-0.5)

    def attend_prompts(self, copy: Copy, qkv: Tensor) -> None:
        first, prompts = self.decodes, self.plan.apart[1]
        q = self.rotate(copy, qkv, slice(first, None))
        self.attend(copy, q, prompts, self.out[first:])

    def attend_decodes(self, copy: Copy, qkv: Tensor) -> None:
        rows, plan = slice(0, self.decodes), self.decode_plan
        if self.variant is None:  # on a CPU
            self.attend(copy, self.rotate(copy, qkv, rows), plan, self.out[rows])
            return
        decode_attention.decode_attention(
            self.variant, qkv[rows], self.cos, self.sin, None, None, EPS, copy.keys, copy.values, plan, self.scale,
            out=self.out[rows],
        )  # fmt: skip

    def rotate(self, copy: Copy, qkv: Tensor, rows: slice) -> Tensor:
        return rotary_kv(
            qkv[rows], self.cos, self.sin, self.positions[rows], self.slots[rows], None, None, EPS, copy.keys,
            copy.values,
        )  # fmt: skip

    def attend(self, copy: Copy, q: Tensor, plan: AttentionPlan, out: Tensor) -> None:
        paged_attention(q, copy.keys, copy.values, plan, self.scale, out=out)

    def attended(self, rows: slice) -> Tensor:
        return self.out[rows].view(-1, self.sizes.heads * self.sizes.head_dim)


def by_torch(x: Tensor, w: Tensor, y: Tensor) -> None:
    torch.mm(x, w.t(), out=y)


class ByLt:
    """cublasLt's own choice for as many multiprocessors; `most` 0: for all."""

    def __init__(self, library: Library, machine: Gpu | Cpu, workspace: Tensor, most: int) -> None:
        self.library, self.machine, self.workspace, self.most = library, machine, workspace, most
        self.chosen: dict[tuple[int, ...], tuple[Product, Algorithm]] = {}

    def __call__(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        shape = (len(x), *w.shape)
        if shape not in self.chosen:
            product = Product(self.library, *shape)
            target = ctypes.c_int32(self.most)
            self.library.set("cublasLtMatmulDescSetAttribute", product.desc, SM_COUNT_TARGET, target)
            self.chosen[shape] = product, product.heuristics(1)[0]
        product, algorithm = self.chosen[shape]
        pointers = (tensor.data_ptr() for tensor in (x, w, y))
        product.bind(algorithm, *pointers, self.workspace.data_ptr(), self.machine.handle)()


class ByTile:
    """kernels/gated_linear of these weights: y is [rows, outputs / 2]. `most` 0: as many blocks as run at once."""

    def __init__(self, weights: Sequence[Tensor], most: int) -> None:
        from service.kernels.gated_linear.cuda import Bound

        self.bound = {w.data_ptr(): Bound(w, Variant(0)) for w in weights}
        for bound in self.bound.values():
            bound.num_blocks = min(most // 2 * 2 or bound.num_blocks, bound.num_blocks)

    def __call__(self, x: Tensor, w: Tensor, y: Tensor) -> None:
        self.bound[w.data_ptr()].write(x, y)


@dataclass
class Way:
    """How gate_up is multiplied: for the rows beside attention, and for all others; the rest is torch's."""

    name: str
    limited: Linear
    free: Linear
    gates: bool = False  # is SwiGLU part of it?


class Arrangements:
    def __init__(self, problem: Problem, machine: Gpu | Cpu) -> None:
        self.problem, self.machine = problem, machine
        self.side = torch.cuda.Stream(priority=0) if isinstance(machine, Gpu) else None

    def start(self, copy: Copy) -> tuple[Tensor, Tensor]:
        """-> the residual stream and q, k, v of all rows."""
        p = self.problem
        hidden, x = add_rms_norm(p.hidden, p.delta, p.norm, EPS)
        qkv = x.new_empty(p.rows, p.sizes.qkv)
        by_torch(x, copy.weights["qkv"], qkv)
        return hidden, qkv

    def finish(self, copy: Copy, gates: bool) -> Tensor:
        p = self.problem
        delta = torch.empty_like(p.hidden)
        by_torch(p.gated if gates else gated_silu(p.gate_up), copy.weights["down"], delta)
        return delta

    def up_to_norm(self, copy: Copy, hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """o and the norm behind it, of attention's `rows`."""
        delta = torch.empty_like(hidden[rows])
        by_torch(self.problem.attended(rows), copy.weights["o"], delta)
        return add_rms_norm(hidden[rows], delta, self.problem.norm, EPS)

    def gate_up(self, copy: Copy, x: Tensor, rows: slice, linear: Linear, gates: bool) -> None:
        p = self.problem
        linear(x, copy.weights["gate_up"], (p.gated if gates else p.gate_up)[rows])

    def in_a_row(self, way: Way, copy: Copy) -> Layer:
        """As it is served, but for `way.free`."""
        p, every = self.problem, slice(None)
        hidden, qkv = self.start(copy)
        p.attend_decodes(copy, qkv)
        p.attend_prompts(copy, qkv)
        hidden, x = self.up_to_norm(copy, hidden, every)
        self.gate_up(copy, x, every, way.free, way.gates)
        return [hidden], self.finish(copy, way.gates)

    def beside(self, way: Way, copy: Copy) -> Layer:
        p, few, many = self.problem, slice(0, self.problem.decodes), slice(self.problem.decodes, None)
        hidden, qkv = self.start(copy)
        p.attend_prompts(copy, qkv)
        prompts, x = self.up_to_norm(copy, hidden, many)
        self.pair(way, copy, qkv, x)
        decodes, x = self.up_to_norm(copy, hidden, few)
        self.gate_up(copy, x, few, way.free, way.gates)
        return [decodes, prompts], self.finish(copy, way.gates)

    def pair(self, way: Way, copy: Copy, qkv: Tensor, x: Tensor) -> None:
        """The product is launched first, and takes its multiprocessors before attention takes all."""
        p, many = self.problem, slice(self.problem.decodes, None)
        if self.side is None:
            self.gate_up(copy, x, many, way.limited, way.gates)
            p.attend_decodes(copy, qkv)
            return
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        self.gate_up(copy, x, many, way.limited, way.gates)
        with torch.cuda.stream(self.side), plain_launches():
            p.attend_decodes(copy, qkv)
        main.wait_stream(self.side)

    def capture(self, do: Callable[[Copy], Any]) -> Any:
        """Every layer once; what it launches has run before."""
        copies = self.problem.copies
        for _ in range(2):
            do(copies[0])
        self.machine.synchronize()
        return self.machine.capture([partial(do, copy) for copy in copies])


@contextmanager
def plain_launches() -> Iterator[None]:
    """A kernel whose predecessor is on another stream cannot be placed before that one is over."""
    before, launch.DEPENDENT = launch.DEPENDENT, False
    try:
        yield
    finally:
        launch.DEPENDENT = before
