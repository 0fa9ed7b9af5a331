"""Paged attention in plain torch against its one-query-at-a-time definition, over ragged batches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.paged_attention import attention_kernel, dense, paged_attention, plan_decode, write_kv
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
            write_kv(
                k, v, self.keys, self.values, blocks[positions // BLOCK_TOKENS], positions % BLOCK_TOKENS
            )


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
    got = paged_attention(q, *caches, len(decode), head_dim**-0.5, window, softcap)
    expected = paged_attention_reference(q, *caches, head_dim**-0.5, window, softcap)
    assert got.shape == q.shape
    assert got.dtype == dtype
    assert relative_rms(got, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [0, 20])
def test_a_plan_made_once_gives_the_same(window: int) -> None:
    lengths = [5, 64, 33]
    pages = Pages(lengths, 2, 32, torch.float32, 0)
    q = torch.randn(3, 4, 32)
    arguments = (q, pages.keys, pages.values, pages.tables, [0, 1, 2, 3], lengths, 3, 0.2, window, 0.0)
    plan = plan_decode(pages.tables, lengths, 3, 2, BLOCK_TOKENS, window, torch.float32)
    assert torch.equal(paged_attention(*arguments, *plan), paged_attention(*arguments))


def test_neighbours_do_not_move_a_float32_row() -> None:
    """Bit for bit: a long neighbour only adds masked keys."""
    lengths = [1, 15, 16, 17, 40, 64, 65, 500, 700]
    pages = Pages(lengths, 3, 64, torch.float32, 1)
    q = torch.randn(len(lengths), 9, 64)
    rows = list(range(len(lengths) + 1))
    together = paged_attention(q, pages.keys, pages.values, pages.tables, rows, lengths, len(lengths), 0.125)
    for row, length in enumerate(lengths):
        alone = paged_attention(
            q[row : row + 1],
            pages.keys,
            pages.values,
            pages.tables[row : row + 1],
            [0, 1],
            [length],
            1,
            0.125,
        )
        assert torch.equal(alone[0], together[row]), f"row {row} of length {length}"


def test_write_kv_touches_only_its_slots() -> None:
    keys = torch.zeros(3, 2, BLOCK_TOKENS, 4)
    values = torch.zeros_like(keys)
    k, v = torch.randn(2, 2, 2, 4)
    write_kv(k, v, keys, values, torch.tensor([2, 1]), torch.tensor([0, 15]))
    assert torch.equal(keys[2, :, 0], k[0])
    assert torch.equal(keys[1, :, 15], k[1])
    assert torch.equal(values[1, :, 15], v[1])
    assert int(keys.count_nonzero()) == k.numel()


def test_schemas_state_what_is_mutated() -> None:
    keys = torch.zeros(3, 2, BLOCK_TOKENS, 4)
    k, v = torch.randn(2, 2, 2, 4)
    torch.library.opcheck(
        torch.ops.halftone.write_kv.default,
        (k, v, keys, keys.clone(), torch.tensor([2, 1]), torch.tensor([0, 15])),
        test_utils="test_schema",
    )


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
    paged_attention(q, pages.keys, pages.values, pages.tables, starts, lengths, num_decode, 0.25)
    name = attention_kernel(dtype, q.device)
    assert name.startswith("torch.scaled_dot_product_attention")
    assert bool(batched) is ("torch.bmm from 4 " in name and num_decode >= 4)
    assert ("torch.bmm" in name) is (dtype == torch.bfloat16)
    assert "torch.bmm" not in attention_kernel(dtype, torch.device("cuda"))
