"""Decode attention in C against its definition, over ragged batches in pages whose other entries are NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.native import absence, load, set_threads
from service.kernels.paged_attention import attention_kernel, dense, native, paged_attention, plan_attention
from service.kernels.paged_attention.reference import paged_attention_reference
from service.model.batch import BLOCK_TOKENS

pytestmark = pytest.mark.skipif(load() is None, reason=absence())

BFLOAT16 = torch.bfloat16
TOLERANCE = 2.0**-8  # of an element, relative to the row's largest: one rounding to bfloat16


class Pages:
    """Random K and V of some sequences in shuffled pages; what belongs to none of them is NaN."""

    def __init__(self, lengths: list[int], kv_heads: int, head_dim: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.lengths = lengths
        num_pages = [-(-length // BLOCK_TOKENS) for length in lengths]
        free = torch.randperm(sum(num_pages)).tolist()
        self.tables = torch.zeros(len(lengths), max(num_pages), dtype=torch.int32)
        shape = (2, sum(num_pages), kv_heads, BLOCK_TOKENS, head_dim)
        self.keys, self.values = torch.randn(shape).to(BFLOAT16)
        for sequence, length in enumerate(lengths):
            blocks = torch.tensor([free.pop() for _ in range(num_pages[sequence])])
            self.tables[sequence, : len(blocks)] = blocks
            for cache in (self.keys, self.values):
                cache[blocks[-1], :, (length - 1) % BLOCK_TOKENS + 1 :] = torch.nan

    def attend(self, q: Tensor, window: int = 0, softcap: float = 0.0, only: int | None = None) -> Tensor:
        """The decode of all sequences or of one; q [sequences, heads, head_dim]."""
        chosen = slice(None) if only is None else slice(only, only + 1)
        lengths = torch.tensor(self.lengths[chosen], dtype=torch.int32)
        caches = (self.keys, self.values)
        assert native.serves(q, *caches)
        scale = q.shape[-1] ** -0.5
        return native.decode(q[chosen], *caches, self.tables[chosen], lengths, scale, window, softcap)

    def expected(self, q: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        starts = list(range(len(self.lengths) + 1))
        return paged_attention_reference(
            q, self.keys, self.values, self.tables, starts, self.lengths, q.shape[-1] ** -0.5, window, softcap
        )


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    largest = expected.abs().amax(-1, keepdim=True)
    error = (got.float() - expected).abs() - TOLERANCE * largest
    assert float(error.nan_to_num(0.0).max()) <= 0


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 5, 8, 9]),
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    window=st.sampled_from([0, 1, 7, 16, 33]),
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_equals_reference(
    lengths: list[int], kv_heads: int, group: int, head_dim: int, window: int, softcap: float, seed: int
) -> None:
    pages = Pages(lengths, kv_heads, head_dim, seed)
    q = torch.randn(len(lengths), kv_heads * group, head_dim).to(BFLOAT16)
    assert_close(pages.attend(q, window, softcap), pages.expected(q, window, softcap))


@pytest.mark.parametrize("window", [0, 1, 100, 512, 513, 600, 1100])
def test_spans_are_joined(window: int) -> None:
    """Lengths around the 128 tokens of a chunk and the 512 of a span, and windows that cut them."""
    lengths = [1, 127, 128, 129, 511, 512, 513, 640, 1024, 1025, 1600]
    pages = Pages(lengths, 1, 64, seed=window)
    q = 3 * torch.randn(len(lengths), 3, 64)
    assert_close(pages.attend(q.to(BFLOAT16), window), pages.expected(q.to(BFLOAT16), window))


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("window", [0, 300])
def test_neighbours_and_threads_do_not_move_a_row(head_dim: int, window: int) -> None:
    """Bit for bit."""
    lengths = [1, 15, 16, 17, 130, 512, 513, 1500]
    pages = Pages(lengths, 3, head_dim, seed=1)
    q = torch.randn(len(lengths), 9, head_dim).to(BFLOAT16)
    together = pages.attend(q, window)
    set_threads(3)
    try:
        for _ in range(20):
            assert torch.equal(pages.attend(q, window), together)
    finally:
        set_threads(torch.get_num_threads())
    for row, length in enumerate(lengths):
        alone = pages.attend(q, window, only=row)
        assert torch.equal(alone[0], together[row]), f"row {row} of length {length}"


@pytest.mark.parametrize("length", [40, 1100])
@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["q", "key", "value"])
def test_broken_numbers_end_where_the_definition_has_them(length: int, broken: float, place: str) -> None:
    pages = Pages([length, 20], 2, 32, seed=0)
    q = torch.randn(2, 4, 32).to(BFLOAT16)
    first = int(pages.tables[0, 1])
    {"q": q[0, 1], "key": pages.keys[first, 0, 3], "value": pages.values[first, 0, 3]}[place][5] = broken
    got, expected = pages.attend(q), pages.expected(q)
    assert torch.equal(got.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.allclose(got[finite].float(), expected[finite], atol=0.02)
    assert got[1].isfinite().all()


def test_a_span_without_a_finite_score_weighs_nothing() -> None:
    pages = Pages([600], 1, 32, seed=0)
    for block in pages.tables[0, :32]:  # the first span
        pages.keys[int(block)] = -torch.inf
    q = torch.ones(1, 2, 32, dtype=BFLOAT16)
    assert_close(pages.attend(q), pages.expected(q))


@pytest.mark.parametrize(("length", "block"), [(0, 0), (-1, 0), (65, 0), (40, -1), (40, 3)])
def test_what_lies_outside_the_tables_is_refused(length: int, block: int) -> None:
    q, caches = torch.zeros(2, 2, 32, dtype=BFLOAT16), torch.zeros(2, 3, 1, BLOCK_TOKENS, 32, dtype=BFLOAT16)
    tables = torch.tensor([[0, 1, 2, 0], [0, 1, block, 0]], dtype=torch.int32)
    lengths = torch.tensor([48, length], dtype=torch.int32)
    with pytest.raises(IndexError, match="sequence 1: "):
        native.decode(q, *caches, tables, lengths, 1.0, 0, 0.0)


def test_decodes_beside_prefills(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding rows come from C, the chunks from torch, and no pages are gathered for the former."""
    pages = Pages([20, 40, 30], 2, 64, seed=0)
    q = torch.randn(2 + 10, 4, 64).to(BFLOAT16)
    starts, scale = [0, 1, 2, 12], 0.125
    plan = plan_attention(pages.tables, starts, pages.lengths, 2)
    monkeypatch.setattr(dense, "_decode", None)
    got = paged_attention(q, pages.keys, pages.values, plan, scale)
    caches = (pages.keys, pages.values, pages.tables, starts, pages.lengths)
    expected = paged_attention_reference(q, *caches, scale)
    assert_close(got[:2], expected[:2])
    assert float((got.float() - expected).norm() / expected.norm()) < 6e-3
    assert not plan._gathered


def test_the_kernel_that_is_named_serves() -> None:
    cpu = torch.device("cpu")
    for dtype, head_dim in ((BFLOAT16, 64), (BFLOAT16, 80), (BFLOAT16, 288), (torch.float32, 64)):
        q = torch.zeros(1, 2, head_dim, dtype=dtype)
        cache = torch.zeros(1, 1, BLOCK_TOKENS, head_dim, dtype=dtype)
        is_native = attention_kernel(dtype, cpu, head_dim).startswith("native.decode_attention")
        assert native.serves(q, cache, cache) is is_native
        assert is_native is (dtype is BFLOAT16 and head_dim == 64)
