"""A decode's attention in one launch: against Triton's kernels, its variants, and what a layer gains.

gpu_kernels --only decode|decode8 --> microseconds of every variant, then one table

`decode8` is over caches of 8-bit codes. Pages are others in every launch, of a pool many times the L2 cache,
in a random order. `chain` stands a norm and the linears of q, k, v and of o around attention, as a layer
does, all launched dependently.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.coded_attention import coded_attention
from service.kernels.decode_attention import Settings, Shape, cuda
from service.kernels.decode_attention.table import CODES, TABLE, row_for, rows_of, variant_of
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

SCALE = HEAD_DIM**-0.5
MAX_TOKENS = 4096  # of a request, as wide as tables are
POOL_COPIES = 4  # of the most pages that are read at once; of fewer there are more copies
MOST_COPIES = 4 * LAYERS
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
TRIED_OVER_CODES = (
    (2, ((4, 2, 16), (4, 2, 8), (2, 3, 16), (8, 2, 8))),
    (32, ((8, 3, 1), (8, 4, 1), (4, 3, 2), (4, 4, 2), (8, 3, 2), (4, 2, 4), (4, 4, 4))),
    (
        256,
        ((8, 2, 1), (8, 3, 1), (8, 4, 1), (8, 6, 1), (4, 3, 1), (4, 4, 1), (4, 6, 1), (2, 6, 1), (8, 3, 2)),
    ),
)


def shape_over(kv_dtype: torch.dtype) -> Shape:
    return Shape(HEAD_DIM, HEADS, KV_HEADS, HALF, kv_dtype)


@dataclass(frozen=True)
class Pool:
    """Pages of K and V, and scales of codes."""

    keys: Tensor  # [blocks, KV_HEADS, PAGE, HEAD_DIM]
    values: Tensor
    scales: Tensor | None

    @classmethod
    def random(cls, blocks: int, kv_dtype: torch.dtype) -> "Pool":
        shape = (blocks, KV_HEADS, PAGE, HEAD_DIM)
        if kv_dtype not in CODES:
            keys, values = (torch.randn(shape, device=CUDA, dtype=kv_dtype) for _ in range(2))
            return cls(keys, values, None)
        # every byte but E4M3's NaN
        keys, values = (
            torch.randint(-127, 127, shape, device=CUDA, dtype=torch.int8).view(kv_dtype) for _ in range(2)
        )
        return cls(keys, values, torch.full((*shape[:-1], 2), 0.01, device=CUDA, dtype=torch.bfloat16))

    @property
    def token_bytes(self) -> int:
        caches = self.keys, self.values, self.scales
        return sum(cache[0, :, 0].numel() * cache.itemsize for cache in caches if cache is not None)

    def copies(self, blocks: int) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        count = min(MOST_COPIES, len(self.keys) // blocks)
        parts = [slice(copy * blocks, (copy + 1) * blocks) for copy in range(count)]
        scales = self.scales
        return [
            (self.keys[part], self.values[part], None if scales is None else scales[part]) for part in parts
        ]


class Rows:
    """So many sequences, and what attends to them."""

    def __init__(self, lengths: list[int], pool: Pool) -> None:
        rows, self.shape = len(lengths), shape_over(pool.keys.dtype)
        pages = [-(-length // PAGE) for length in lengths]
        self.caches = pool.copies(sum(pages) + 1)
        free = torch.randperm(sum(pages), device=CUDA, dtype=torch.int32) + 1
        tables = [F.pad(blocks, (0, MAX_TOKENS // PAGE - len(blocks))) for blocks in free.split(pages)]
        told = torch.tensor(lengths, device=CUDA)
        self.step = decode_plan(torch.stack(tables), told.int())
        self.positions = told - 1
        blocks = self.step.block_tables.long().gather(1, self.positions[:, None] // PAGE)[:, 0]
        self.slots = blocks * PAGE + self.positions % PAGE
        self.cos, self.sin = torch.rand(2, MAX_TOKENS, HEAD_DIM, device=CUDA)
        self.qkv = torch.randn(rows, QKV, device=CUDA, dtype=HALF)
        self.num_bytes = sum(lengths) * pool.token_bytes

    def in_one(self, settings: Settings, i: int, qkv: Tensor) -> Tensor:
        keys, values, scales = self.caches[i % len(self.caches)]
        rest = keys, values, self.step, SCALE, 0, 0.0, scales
        variant = variant_of(self.shape, settings)
        return cuda.decode_attention(variant, qkv, self.cos, self.sin, None, None, 1e-5, *rest)

    def by_triton(self, i: int, qkv: Tensor) -> Tensor:
        keys, values, scales = self.caches[i % len(self.caches)]
        where = self.positions, self.slots
        q = rotary_kv(qkv, self.cos, self.sin, *where, None, None, 1e-5, keys, values, scales)
        if scales is None:
            return paged_attention(q, keys, values, self.step, SCALE)
        return coded_attention(q, keys, values, scales, self.step, SCALE)

    def timed(self, attend: Callable[[int, Tensor], Tensor]) -> float:
        return microseconds(lambda i: attend(i, self.qkv), len(self.caches))


def settings_for(rows: int, kv_dtype: torch.dtype) -> list[Settings]:
    tried = TRIED_OVER_CODES if kv_dtype in CODES else TRIED
    return [Settings(*settings) for settings in next(found for most, found in tried if rows <= most)]


def usual(shape: Shape, rows: int) -> Settings:
    """What serves."""
    variant = row_for(rows_of(shape, TABLE), rows).variant
    return Settings(variant.warps, variant.stages, variant.splits)


def cases(rows: int, contexts: tuple[int, ...]) -> Iterator[tuple[str, list[int]]]:
    """What a line is called, and its lengths."""
    for context in contexts:
        yield f"{context} each", [context] * rows
    if rows > 1:
        ragged = torch.randint(1, 2 * CONTEXT, (rows,), generator=torch.Generator().manual_seed(0)).tolist()
        scaled = [max(1, length * CONTEXT * rows // (sum(ragged) + 2 * PAGE * rows)) for length in ragged]
        yield "ragged", scaled


def run(
    all_rows: list[int], kv_dtypes: tuple[torch.dtype, ...] = (HALF,), contexts: tuple[int, ...] = (CONTEXT,)
) -> None:
    """Prints what was measured, then the table."""
    wanted = {
        variant_of(shape_over(kv_dtype), each)
        for kv_dtype in kv_dtypes
        for rows in all_rows
        for each in (*settings_for(rows, kv_dtype), usual(shape_over(kv_dtype), rows))
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(cuda.load, wanted))
    blocks = POOL_COPIES * (max(*all_rows, 16) * max(contexts) // PAGE + 1)
    table = []
    for kv_dtype in kv_dtypes:
        pages = Pool.random(blocks, kv_dtype)
        for rows in all_rows:
            for name, lengths in cases(rows, contexts):
                table.append(compare(name, Rows(lengths, pages), rows))
        del pages
    print(
        f"{'rows':>5}  {'tokens':10} {'cache':14} {'floor':>7} {'Triton':>7} {'table':>7} {'best':>7}  "
        f"{'warps, stages, splits':22} {'chain: Triton':>14} {'table':>7}"
    )
    for line in table:
        print(line)


def compare(name: str, given: Rows, rows: int) -> str:
    """-> a line of the table."""
    floor = given.num_bytes / READ_BYTES_PER_SECOND * 1e6
    kv_dtype = given.shape.kv_dtype
    cache = str(kv_dtype).removeprefix("torch.")
    label = f"{name}, {cache}"
    by_triton = given.timed(given.by_triton)
    show(rows, f"{label}: rotary_kv, attention", by_triton, given.num_bytes)
    served = usual(given.shape, rows)
    found: dict[Settings, float] = {}
    for settings in dict.fromkeys((*settings_for(rows, kv_dtype), served)):
        found[settings] = given.timed(lambda i, qkv, one=settings: given.in_one(one, i, qkv))
        show(rows, f"{label}: {settings}", found[settings], given.num_bytes)
    best = min(found, key=found.__getitem__)
    told = f"{best.warps}, {best.stages}, {best.splits}"
    chains = [chain(rows, given.by_triton), chain(rows, lambda i, qkv: given.in_one(served, i, qkv))]
    return (
        f"{rows:5d}  {name:10} {cache:14} {floor:7.1f} {by_triton:7.1f} {found[served]:7.1f} "
        f"{found[best]:7.1f}  {told:22} {chains[0]:14.1f} {chains[1]:7.1f}"
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
