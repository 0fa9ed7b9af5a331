"""Paged attention in plain torch against its one-query-at-a-time definition, over ragged batches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.paged_attention import attention_kernel, dense, paged_attention, plan_attention
from service.kernels.paged_attention.reference import paged_attention_reference
from service.model.batch import BLOCK_TOKENS

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}  # relative RMS


class Pages:
    """Random K and V of some sequences in shuffled pages, every unused entry NaN-free but loud."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int
    ) -> None:
        torch.manual_seed(seed)
        pages = [-(-length // BLOCK_TOKENS) for length in lengths]
        free = (torch.randperm(sum(pages)) + 1).tolist()
        self.tables = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
        shape = (sum(pages) + 1, kv_heads, BLOCK_TOKENS, head_dim)
        self.keys, self.values = torch.full(shape, 1e4, dtype=dtype), torch.full(shape, 1e4, dtype=dtype)
        for sequence, length in enumerate(lengths):
            blocks = torch.tensor([free.pop() for _ in range(pages[sequence])])
            self.tables[sequence, : len(blocks)] = blocks
            positions = torch.arange(length)
            k, v = torch.randn(2, length, kv_heads, head_dim).to(dtype)
            places = (blocks[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS)
            self.keys.transpose(1, 2).index_put_(places, k)
            self.values.transpose(1, 2).index_put_(places, v)

    def attend(
        self,
        q: Tensor,
        query_starts: list[int],
        lengths: list[int],
        num_decode: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        first: int = 0,
    ) -> Tensor:
        """Planned and computed; `first` is the sequence that the lists begin with."""
        tables = self.tables[first : first + len(lengths)]
        plan = plan_attention(tables, query_starts, lengths, num_decode)
        return paged_attention(q, self.keys, self.values, plan, scale, window, softcap)


def relative_rms(got: Tensor, expected: Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm())


@settings(max_examples=60, deadline=None)
@given(
    decode=st.lists(st.integers(1, 70), max_size=4),
    prefill=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), max_size=3),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([16, 64]),
    window=st.sampled_from([0, 1, 7, 16, 33]),
    softcap=st.sampled_from([0.0, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_equals_reference(
    decode: list[int],
    prefill: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    softcap: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    lengths = decode + [earlier + chunk for earlier, chunk in prefill] or [1]
    chunks = [1] * len(decode) + [chunk for _, chunk in prefill] or [1]
    pages = Pages(lengths, kv_heads, head_dim, dtype, seed)
    starts = [0]
    for chunk in chunks:
        starts.append(starts[-1] + chunk)
    q = torch.randn(starts[-1], kv_heads * group, head_dim).to(dtype)
    caches = (pages.keys, pages.values, pages.tables, starts, lengths)
    got = pages.attend(q, starts, lengths, len(decode), head_dim**-0.5, window, softcap)
    expected = paged_attention_reference(q, *caches, head_dim**-0.5, window, softcap)
    assert got.shape == q.shape
    assert got.dtype == dtype
    assert relative_rms(got, expected) < TOLERANCE[dtype]


def test_neighbours_do_not_move_a_float32_row() -> None:
    """Bit for bit: a long neighbour only adds masked keys."""
    lengths = [1, 15, 16, 17, 40, 64, 65, 500, 700]
    pages = Pages(lengths, 3, 64, torch.float32, 1)
    q = torch.randn(len(lengths), 9, 64)
    rows = list(range(len(lengths) + 1))
    together = pages.attend(q, rows, lengths, len(lengths), 0.125)
    for row, length in enumerate(lengths):
        alone = pages.attend(q[row : row + 1], [0, 1], [length], 1, 0.125, first=row)
        assert torch.equal(alone[0], together[row]), f"row {row} of length {length}"


@pytest.mark.parametrize("num_decode", [3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_that_is_named_serves(
    dtype: torch.dtype, num_decode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched: list[int] = []
    products = dense._batched_products

    def noted(q: Tensor, *rest: Any) -> Tensor:
        batched.append(len(q))
        return products(q, *rest)

    monkeypatch.setattr(dense, "_batched_products", noted)
    lengths = [5] * num_decode
    pages = Pages(lengths, 2, 16, dtype, seed=0)
    q = torch.randn(num_decode, 4, 16).to(dtype)
    starts = list(range(num_decode + 1))
    pages.attend(q, starts, lengths, num_decode, 0.25)
    name = attention_kernel(dtype, q.device, 16, 2)
    assert name.startswith("torch.scaled_dot_product_attention")
    assert bool(batched) is ("torch.bmm from 4 " in name and num_decode >= 4)
    assert ("torch.bmm" in name) is (dtype == torch.bfloat16)
    assert "torch.bmm" not in attention_kernel(dtype, torch.device("cuda"), 16, 2)
