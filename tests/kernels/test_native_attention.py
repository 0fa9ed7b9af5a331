"""Attention in C against its definition, over ragged batches in pages whose other entries are NaN."""

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
DECODE_BOUND = 2.0**-8  # of an element, relative to its row's largest: one rounding to bfloat16
PREFILL_BOUND = 2.0**-7  # the weights are rounded too


class Pages:
    """Random K and V of some sequences in shuffled pages; what belongs to none of them is NaN.

    Of each sequence the last `chunks[s]` tokens are queries, the decoding sequences first.
    """

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, seed: int, chunks: list[int] | None = None
    ) -> None:
        torch.manual_seed(seed)
        self.lengths, self.chunks = lengths, chunks or [1] * len(lengths)
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

    @property
    def num_queries(self) -> int:
        return sum(self.chunks)

    def attend(self, q: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        """q [queries, heads, head_dim], through the one entry that the decoder calls."""
        plan = plan_attention(self.tables, self._starts, self.lengths, self._num_decode)
        return paged_attention(q, self.keys, self.values, plan, q.shape[-1] ** -0.5, window, softcap)

    def expected(self, q: Tensor, window: int = 0, softcap: float = 0.0) -> Tensor:
        caches = (self.keys, self.values, self.tables, self._starts, self.lengths)
        return paged_attention_reference(q, *caches, q.shape[-1] ** -0.5, window, softcap)

    def only(self, sequence: int, length: int, chunk: int) -> "Pages":
        """One sequence cut behind `length` tokens, of which the last `chunk` are queries."""
        part = object.__new__(Pages)
        part.keys, part.values = self.keys, self.values
        part.tables = self.tables[sequence : sequence + 1]
        part.lengths, part.chunks = [length], [chunk]
        return part

    @property
    def _starts(self) -> list[int]:
        return [sum(self.chunks[:i]) for i in range(len(self.chunks) + 1)]

    @property
    def _num_decode(self) -> int:
        return sum(chunk == 1 for chunk in self.chunks)


def assert_close(got: Tensor, expected: Tensor, bound: float) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    largest = expected.abs().amax(-1, keepdim=True)
    error = (got.float() - expected).abs() - bound * largest
    assert float(error.nan_to_num(0.0).max()) <= 0


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_decode", None)
    monkeypatch.setattr(dense, "_prefill", None)


windows = st.sampled_from([0, 1, 7, 16, 33, 100])
groups = st.sampled_from([1, 2, 3, 4, 5, 8, 9])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 80), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=groups,
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    window=windows,
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_decode_equals_reference(
    lengths: list[int], kv_heads: int, group: int, head_dim: int, window: int, softcap: float, seed: int
) -> None:
    pages = Pages(lengths, kv_heads, head_dim, seed)
    q = torch.randn(len(lengths), kv_heads * group, head_dim).to(BFLOAT16)
    assert_close(pages.attend(q, window, softcap), pages.expected(q, window, softcap), DECODE_BOUND)


@settings(max_examples=25, deadline=None)
@given(
    decode=st.lists(st.integers(1, 80), max_size=2),
    prefill=st.lists(st.tuples(st.integers(0, 140), st.integers(2, 40)), min_size=1, max_size=2),
    kv_heads=st.integers(1, 3),
    group=groups,
    head_dim=st.sampled_from([64, 128]),
    window=windows,
    softcap=st.sampled_from([0.0, 2.0]),
    seed=st.integers(0, 99),
)
def test_prefill_beside_decode_equals_reference(
    decode: list[int],
    prefill: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    head_dim: int,
    window: int,
    softcap: float,
    seed: int,
) -> None:
    lengths = decode + [earlier + chunk for earlier, chunk in prefill]
    pages = Pages(lengths, kv_heads, head_dim, seed, [1] * len(decode) + [chunk for _, chunk in prefill])
    q = torch.randn(pages.num_queries, kv_heads * group, head_dim).to(BFLOAT16)
    assert_close(pages.attend(q, window, softcap), pages.expected(q, window, softcap), PREFILL_BOUND)


@pytest.mark.parametrize("window", [0, 1, 100, 512, 513, 600, 1100])
def test_spans_are_joined(window: int) -> None:
    """Lengths around the 128 tokens of a chunk and the 512 of a span, and windows that cut them."""
    lengths = [1, 127, 128, 129, 511, 512, 513, 640, 1024, 1025, 1600]
    pages = Pages(lengths, 1, 64, seed=window)
    q = (3 * torch.randn(len(lengths), 3, 64)).to(BFLOAT16)
    assert_close(pages.attend(q, window), pages.expected(q, window), DECODE_BOUND)


@pytest.mark.parametrize("place", [3, 700, 1500])
@pytest.mark.parametrize("chunk", [1, 12])
def test_a_score_far_above_the_others_does_not_overflow(place: int, chunk: int) -> None:
    pages = Pages([1550], 1, 64, seed=0, chunks=[chunk])
    q = torch.randn(chunk, 2, 64).to(BFLOAT16)
    pages.keys[int(pages.tables[0, place // 16]), 0, place % 16] = 300 * q[-1, 0]
    assert_close(pages.attend(q), pages.expected(q), PREFILL_BOUND)


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("window", [0, 300])
def test_neighbours_and_threads_do_not_move_a_decode(head_dim: int, window: int) -> None:
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
        alone = pages.only(row, length, 1).attend(q[row : row + 1], window)
        assert torch.equal(alone[0], together[row]), f"row {row} of length {length}"


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_neighbours_and_chunks_do_not_move_a_prefill(group: int, window: int) -> None:
    """Bit for bit: a prompt in one piece beside another one, and alone in pieces."""
    pages = Pages([90, 200], 2, 64, seed=1, chunks=[80, 200])
    q = torch.randn(280, 2 * group, 64).to(BFLOAT16)
    together = pages.attend(q, window)
    for start, stop in ((0, 64), (64, 66), (66, 163), (163, 200)):
        rows = slice(80 + start, 80 + stop)
        alone = pages.only(1, stop, stop - start).attend(q[rows], window)
        assert torch.equal(alone, together[rows]), f"tokens {start} to {stop}"


@pytest.mark.parametrize(("length", "chunk"), [(40, 1), (1100, 1), (40, 9)])
@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", ["q", "key", "value"])
def test_broken_numbers_end_where_the_definition_has_them(
    length: int, chunk: int, broken: float, place: str
) -> None:
    pages = Pages([20, length], 2, 64, 0, [1, chunk])
    q = torch.randn(1 + chunk, 4, 64).to(BFLOAT16)
    page = int(pages.tables[1, 1])
    {"q": q[1, 1], "key": pages.keys[page, 0, 3], "value": pages.values[page, 0, 3]}[place][5] = broken
    got, expected = pages.attend(q), pages.expected(q)
    assert torch.equal(got.isnan(), expected.isnan())
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert torch.allclose(got[finite].float(), expected[finite], atol=0.03)
    assert got[0].isfinite().all()


@pytest.mark.parametrize("chunk", [1, 3])
def test_what_no_query_sees_may_be_broken(chunk: int) -> None:
    pages = Pages([90], 1, 64, 0, [chunk])
    for token in range(90 - chunk - 20 + 1):
        for cache in (pages.keys, pages.values):
            cache[int(pages.tables[0, token // BLOCK_TOKENS]), :, token % BLOCK_TOKENS] = torch.nan
    q = torch.randn(chunk, 2, 64).to(BFLOAT16)
    assert_close(pages.attend(q, window=20), pages.expected(q, window=20), PREFILL_BOUND)


def test_a_span_without_a_finite_score_weighs_nothing() -> None:
    pages = Pages([600], 1, 32, seed=0)
    for block in pages.tables[0, :32]:  # the first span
        pages.keys[int(block)] = -torch.inf
    q = torch.ones(1, 2, 32, dtype=BFLOAT16)
    assert_close(pages.attend(q), pages.expected(q), DECODE_BOUND)


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize(("length", "block"), [(0, 0), (-1, 0), (65, 0), (40, -1), (40, 3)])
def test_what_lies_outside_the_tables_is_refused(length: int, block: int, chunk: int) -> None:
    q = torch.zeros(2 * chunk, 2, 64, dtype=BFLOAT16)
    keys, values = torch.zeros(2, 3, 1, BLOCK_TOKENS, 64, dtype=BFLOAT16)
    tables = torch.tensor([[0, 1, block, 0], [0, 1, 2, 0]], dtype=torch.int32)
    plan = plan_attention(tables, [0, chunk, 2 * chunk], [length, 48], 2 if chunk == 1 else 0)
    with pytest.raises(IndexError, match=f"sequence 0: its {length} tokens"):
        paged_attention(q, keys, values, plan, 1.0)


KINDS = [(BFLOAT16, 64, 3), (BFLOAT16, 96, 3), (BFLOAT16, 64, 33), (BFLOAT16, 80, 1), (BFLOAT16, 288, 1)]


@pytest.mark.parametrize(
    ("dtype", "head_dim", "group"), [*KINDS, (torch.float32, 64, 3), (torch.float16, 64, 3)]
)
def test_the_kernel_that_is_named_serves(
    dtype: torch.dtype, head_dim: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_torch: list[str] = []
    for name in ("_decode", "_prefill"):

        def noted(q: Tensor, *rest: object, name: str = name) -> Tensor:
            by_torch.append(name)
            return q

        monkeypatch.setattr(dense, name, noted)
    q = torch.zeros(1 + 4, group, head_dim, dtype=dtype)
    caches = torch.zeros(2, 2, 1, BLOCK_TOKENS, head_dim, dtype=dtype)
    plan = plan_attention(torch.tensor([[0], [1]], dtype=torch.int32), [0, 1, 5], [3, 4], 1)
    paged_attention(q, *caches, plan, 1.0)
    named = attention_kernel(dtype, torch.device("cpu"), head_dim, group)
    assert ("native.avx512.decode_attention" in named) is ("_decode" not in by_torch)
    assert ("native.avx512.prefill_attention" in named) is ("_prefill" not in by_torch)
    assert ("native.avx512.decode_attention" in named) is (dtype is BFLOAT16 and head_dim in (64, 96))
    assert ("native.avx512.prefill_attention" in named) is (
        dtype is BFLOAT16 and head_dim == 64 and group == 3
    )


def test_nothing_is_gathered_for_a_native_decode() -> None:
    pages = Pages([20], 2, 64, seed=0)
    plan = plan_attention(pages.tables, [0, 1], pages.lengths, 1)
    paged_attention(torch.zeros(1, 4, 64, dtype=BFLOAT16), pages.keys, pages.values, plan, 0.125)
    assert not plan._gathered
    assert native.has_decode(BFLOAT16, 64)
