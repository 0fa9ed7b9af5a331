"""A decode's attention in one launch: against Triton's kernels, its variants, and what a layer gains.

gpu_kernels --only decode --> microseconds of every variant, then one table

Pages are others in every launch, 32 copies of them, in a random order. `chain` stands a norm and the linears
of q, k, v and of o around attention, as a layer does, all launched dependently.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.decode_attention import Settings, Shape, cuda
from service.kernels.decode_attention.table import TABLE, row_for, rows_of, variant_of
from service.kernels.dense_linear import bind_linear, dense_linear
from service.kernels.paged_attention import decode_plan, paged_attention
from service.kernels.rotary_kv import rotary_kv
from tests.benchmarks.gpu_timing import (
    CONTEXT,
    CUDA,
    HALF,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    PAGE,
    QKV,
    READ_BYTES_PER_SECOND,
    microseconds,
    show,
)

SHAPE = Shape(HEAD_DIM, HEADS, KV_HEADS, HALF, HALF)
MAX_TOKENS = 4096  # of a request, as wide as tables are
# warps, stages, splits: by the most sequences that they are tried with
TRIED = (
    (2, ((4, 2, 16), (4, 2, 8), (4, 2, 4), (2, 2, 16), (2, 2, 8), (2, 3, 8), (8, 2, 8), (8, 2, 4))),
    (
        32,
        ((4, 2, 1), (4, 3, 1), (8, 2, 1), (8, 3, 1), (4, 2, 2), (4, 3, 2), (2, 3, 2),
         (4, 2, 4), (2, 3, 4), (2, 2, 4), (4, 2, 8)),
    ),
    (
        256,
        ((4, 2, 1), (4, 3, 1), (2, 2, 1), (2, 3, 1), (2, 4, 1), (8, 3, 1), (1, 6, 1), (4, 2, 2), (2, 3, 2)),
    ),
)  # fmt: skip


class Rows:
    """So many sequences, and what attends to them."""

    def __init__(self, lengths: list[int], keys: list[Tensor], values: list[Tensor]) -> None:
        rows, self.keys, self.values = len(lengths), keys, values
        pages = [-(-length // PAGE) for length in lengths]
        free = torch.randperm(sum(pages), device=CUDA, dtype=torch.int32) + 1
        tables = [F.pad(blocks, (0, MAX_TOKENS // PAGE - len(blocks))) for blocks in free.split(pages)]
        told = torch.tensor(lengths, device=CUDA)
        self.step = decode_plan(torch.stack(tables), told.int())
        self.positions = told - 1
        blocks = self.step.block_tables.long().gather(1, self.positions[:, None] // PAGE)[:, 0]
        self.slots = blocks * PAGE + self.positions % PAGE
        self.cos, self.sin = torch.rand(2, MAX_TOKENS, HEAD_DIM, device=CUDA)
        self.qkv = torch.randn(rows, QKV, device=CUDA, dtype=HALF)
        self.num_bytes = sum(lengths) * KV_HEADS * HEAD_DIM * 4

    def in_one(self, settings: Settings | None, i: int, qkv: Tensor) -> Tensor:
        usual = row_for(rows_of(SHAPE, TABLE), len(qkv)).variant
        variant = variant_of(SHAPE, settings) if settings else usual
        pages = self.keys[i], self.values[i], self.step
        return cuda.decode_attention(
            variant, qkv, self.cos, self.sin, None, None, 1e-5, *pages, HEAD_DIM**-0.5, 0, 0.0
        )

    def by_triton(self, i: int, qkv: Tensor) -> Tensor:
        pages = self.keys[i], self.values[i]
        q = rotary_kv(qkv, self.cos, self.sin, self.positions, self.slots, None, None, 1e-5, *pages)
        return paged_attention(q, *pages, self.step, HEAD_DIM**-0.5)


def run(all_rows: list[int]) -> None:
    """Prints what was measured, then the table."""
    tried = {Settings(*settings) for _, found in TRIED for settings in found} | {each for _, each in TABLE}
    with ThreadPoolExecutor() as pool:
        list(pool.map(cuda.load, [variant_of(SHAPE, settings) for settings in tried]))
    blocks = max(*all_rows, 16) * CONTEXT // PAGE + 1
    shape = (LAYERS, blocks, KV_HEADS, PAGE, HEAD_DIM)
    keys, values = (list(torch.randn(shape, device=CUDA, dtype=HALF).unbind()) for _ in range(2))
    table = []
    for rows in all_rows:
        ragged = torch.randint(1, 2 * CONTEXT, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
        scaled = [max(1, length * CONTEXT * rows // (sum(ragged) + 2 * PAGE * rows)) for length in ragged]
        table.append(compare(f"{CONTEXT} each", Rows([CONTEXT] * rows, keys, values), rows))
        if rows > 1:
            table.append(compare("ragged", Rows(scaled, keys, values), rows))
    print(
        f"{'rows':>5}  {'tokens':12} {'floor':>7} {'Triton':>7} {'table':>7} {'best':>7}  "
        f"{'warps, stages, splits':24} {'chain: Triton':>14} {'table':>7}"
    )
    for line in table:
        print(line)


def compare(name: str, given: Rows, rows: int) -> str:
    """-> a line of the table."""
    floor = given.num_bytes / READ_BYTES_PER_SECOND * 1e6
    by_triton = microseconds(lambda i: given.by_triton(i, given.qkv))
    show(rows, f"{name}: rotary_kv, paged_attention", by_triton, given.num_bytes)
    usual = microseconds(lambda i: given.in_one(None, i, given.qkv))
    show(rows, f"{name}: decode_attention", usual, given.num_bytes)
    found: dict[tuple[int, int, int], float] = {}
    for settings in next(tried for most, tried in TRIED if rows <= most):
        one = Settings(*settings)
        found[settings] = microseconds(lambda i, one=one: given.in_one(one, i, given.qkv))
        show(rows, f"{name}: {settings}", found[settings], given.num_bytes)
    best = min(found, key=found.__getitem__)
    chains = [chain(rows, given.by_triton), chain(rows, lambda i, qkv: given.in_one(None, i, qkv))]
    return (
        f"{rows:5d}  {name:12} {floor:7.1f} {by_triton:7.1f} {usual:7.1f} {found[best]:7.1f}  {best!s:24}"
        f" {chains[0]:14.1f} {chains[1]:7.1f}"
    )


def chain(rows: int, attend: Callable[[int, Tensor], Tensor]) -> float:
    """A norm, the linear of q, k and v, attention and the linear of o, their weights beyond the L2 cache."""
    copies = 8  # of 50 MB
    weights = [
        [torch.randn(out, HIDDEN, device=CUDA, dtype=HALF) * 0.02 for out in (QKV, HIDDEN)]
        for _ in range(copies)
    ]
    layers = [
        [bind_linear(weight) or (lambda x, w=weight: dense_linear(x, w)) for weight in pair]
        for pair in weights
    ]
    hidden, norm = (
        torch.randn(rows, HIDDEN, device=CUDA, dtype=HALF),
        torch.ones(HIDDEN, device=CUDA, dtype=HALF),
    )

    def layer(i: int) -> Tensor:
        qkv, o = layers[i % copies]
        attended = attend(i, qkv(add_rms_norm(hidden, None, norm, 1e-5)[1]))
        return o(attended.view(rows, -1))

    return microseconds(layer)
