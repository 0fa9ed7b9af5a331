"""Attention of a deterministic plan in Triton's interpreter: a row depends on its own sequence alone."""

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from service.kernels.paged_attention import decode_plan, plan_attention
from service.kernels.paged_attention.reference import paged_attention_reference
from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import Pages, relative_rms
from tests.kernels.test_paged_attention_triton import TOLERANCE

WINDOWS = pytest.mark.parametrize("window", [0, 70])
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
KV_HEADS, GROUP, HEAD_DIM = 1, 4, 64
SCALE = HEAD_DIM**-0.5


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.paged_attention.triton") as module:
        yield module


@WINDOWS
@DTYPES
def test_a_decoding_row_is_the_same_beside_longer_ones(
    kernels: ModuleType, dtype: torch.dtype, window: int
) -> None:
    """Some have one split, some several; alone a row's table is only as wide as it needs."""
    lengths = [5, 256, 300, 700, 40]
    pages = Pages(lengths, KV_HEADS, HEAD_DIM, dtype, seed=3)
    q = torch.randn(len(lengths), KV_HEADS * GROUP, HEAD_DIM).to(dtype)

    def decoded(rows: list[int], width: int) -> torch.Tensor:
        out = torch.full_like(q[rows], float("nan"))
        told = torch.tensor([lengths[row] for row in rows], dtype=torch.int32)
        plan = decode_plan(pages.tables[rows, :width].contiguous(), told, deterministic=True)
        kernels.decode(q[rows], pages.keys, pages.values, plan, out, SCALE, window, 0.0)
        return out

    together = decoded([0, 1, 2, 3, 4], pages.tables.shape[1])
    starts = list(range(len(lengths) + 1))
    want = paged_attention_reference(
        q, pages.keys, pages.values, pages.tables, starts, lengths, SCALE, window
    )
    assert relative_rms(together, want) < TOLERANCE[dtype]
    for row, length in enumerate(lengths):
        assert torch.equal(decoded([row], -(-length // 16))[0], together[row])


@WINDOWS
@DTYPES
def test_a_query_is_the_same_however_its_prompt_is_cut(
    kernels: ModuleType, dtype: torch.dtype, window: int
) -> None:
    """Whole, in chunks that no tile fits, one token at a time, and beside another prompt."""
    length, other = 150, 33
    pages = Pages([length, other], KV_HEADS, HEAD_DIM, dtype, seed=5)
    q = torch.randn(length + other, KV_HEADS * GROUP, HEAD_DIM).to(dtype)

    def attended(cuts: list[int], beside: bool = False) -> torch.Tensor:
        parts = []
        for start, stop in pairwise(cuts):
            count = stop - start
            queries = torch.cat((q[start:stop], q[length:])) if beside else q[start:stop].contiguous()
            lengths, starts = ([stop, other], [0, count, count + other]) if beside else ([stop], [0, count])
            tables = pages.tables[: len(lengths)]
            plan = plan_attention(tables, starts, lengths, 0, deterministic=True)
            got = kernels.paged_attention(queries, pages.keys, pages.values, plan, SCALE, window)
            parts.append(got[:count])
        return torch.cat(parts)

    whole = attended([0, length])
    want = paged_attention_reference(
        q[:length], pages.keys, pages.values, pages.tables[:1], [0, length], [length], SCALE, window
    )
    assert relative_rms(whole, want) < TOLERANCE[dtype]
    assert torch.equal(attended([0, length], beside=True), whole)
    assert torch.equal(attended([0, 1, 38, 64, 65, 129, length]), whole)
    assert torch.equal(attended([0, 7, 100, length], beside=True), whole)
