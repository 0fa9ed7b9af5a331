"""The Triton kernels that find what filters keep, in their interpreter against the reference."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.sample.reference import sample, scaled
from service.kernels.sample_likely import reference
from tests.kernels.interpreter import interpreted

VOCAB = 9001  # three chunks, the last one short
SUPPRESSED = -1e30


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name in ("greedy", "sample", "sample_likely"):
            module = stack.enter_context(interpreted(f"service.kernels.{name}.triton"))
            patch.setitem(sys.modules, f"service.kernels.{name}.triton", module)
        yield module


@dataclass
class Rows:
    """Each row: temperature, top-k, top-p, min-p."""

    filters: list[tuple[float, int, float, float]]

    def __post_init__(self) -> None:
        temperature, top_k, top_p, min_p = zip(*self.filters, strict=True)
        # columns of matrices, as a step has them
        self.temperature = torch.tensor([temperature] * 3).t().contiguous()[:, 2]
        self.top_k = torch.tensor([top_k] * 2, dtype=torch.int32).t().contiguous()[:, 1]
        fractions = torch.tensor([top_p, min_p], dtype=torch.float64).t().contiguous()
        self.top_p, self.min_p = fractions.unbind(1)

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.temperature, self.top_k, self.top_p, self.min_p

    @property
    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        count = torch.arange(len(self.filters))
        seeds, positions, sample_indices = torch.stack((count * -977, count * 31, count % 3), 1).unbind(1)
        return seeds, positions, sample_indices.int()


def assert_kept_alike(kernels: ModuleType, logits: Tensor, rows: Rows) -> Tensor:
    """-> bool [rows, vocab], the tokens with some mass that are kept, by the kernels as by the reference."""
    over = scaled(logits, rows.temperature)
    want = reference.kept(over, rows.top_k.long(), rows.top_p, rows.min_p)
    least, last = kernels.limits_of(logits, *rows.columns, kernels.likeliest(logits))
    least, last, token_ids = least.unsqueeze(1), last.unsqueeze(1), torch.arange(logits.shape[1])
    got = (over > least) | ((over == least) & (token_ids <= last))
    has_mass = over.exp() > 0
    differ = ((got != want) & has_mass).any(1)
    assert not differ.any(), [rows.filters[row] for row in differ.nonzero().flatten()]
    return got & has_mass


FILTERS = [
    (1.0, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.3, 50, 1.0, 0.0),
    (1.0, VOCAB - 1, 1.0, 0.0),
    (1.0, 2**31 - 1, 0.9137, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (5.0, 0, 0.5137, 0.0),
    (1.0, 0, 1 - 1e-9, 0.0),
    (0.7, 40, 0.9137, 0.0),
    (3.0, 3000, 0.9737, 0.01),
    (1.0, 0, 1.0, 0.0537),
    (1.0, 200, 0.9837, 0.137),
    (1.0, 0, 0.5137, 1.0),
]


def test_what_is_kept_is_the_references(kernels: ModuleType) -> None:
    logits = torch.randn(len(FILTERS), VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    num_kept = assert_kept_alike(kernels, logits, Rows(FILTERS)).sum(1).tolist()
    assert num_kept[1:4] == [1, 50, VOCAB - 1]
    assert len(set(num_kept)) > 9


def test_the_end_lies_in_the_gap_behind_the_likeliest_or_beyond(kernels: ModuleType) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3)) * 3
    logits[:, 5001] = 25.0
    logits[:, ::2] = SUPPRESSED
    rows = Rows([FILTERS[2], FILTERS[3], (5.0, 0, 0.9137, 0.0), FILTERS[4], FILTERS[8]])
    num_kept = assert_kept_alike(kernels, logits, rows).sum(1).tolist()
    assert num_kept[0] == 50
    assert num_kept[1] == VOCAB // 2, "the others have no mass"
    assert num_kept[2] > 1000
    assert num_kept[3:] == [1, 1]


def test_equals_on_the_border_are_kept_in_the_order_of_their_ids(kernels: ModuleType) -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(6)).mul(3).round()
    rows = Rows([FILTERS[2], FILTERS[4], FILTERS[8], FILTERS[9], FILTERS[12]])
    kept = assert_kept_alike(kernels, logits, rows)
    assert kept.sum(1)[0] == 50
    num_divided = 0
    for row in range(4):
        equals = kept[row][logits[row] == logits[row][kept[row]].min()]
        num_divided += int(not equals.all())
        assert equals.int().diff().max() <= 0, "first those with the lower ids"
    assert num_divided >= 3


def test_equals_fill_all_lists(kernels: ModuleType) -> None:
    """No stretch divides them, so `settle` goes through all of them, by their ids."""
    logits = torch.full((3, VOCAB), -17.5)
    rows = Rows([(0.3, 50, 1.0, 0.0), (1.0, 0, 0.9137, 0.0), (9.0, 6000, 0.5137, 0.5)])
    kept = assert_kept_alike(kernels, logits, rows)
    assert kept.sum(1).tolist() == [row.nonzero().max() + 1 for row in kept] == [50, 8225, 3083]


def test_rows_draw_what_the_reference_draws(kernels: ModuleType) -> None:
    """A row without filters what it draws without this kernel, a broken one nothing, each alone the same."""
    filters = [(1.0, 0, 1.0, 0.0), (0.0, 7, 0.5, 0.5), (1e-30, 20, 0.9, 0.0), (50.0, 20, 1.0, 0.0)]
    filters += [(2.0, 0, 0.9137, 0.0), (2.0, 700, 0.9137, 0.0), (2.0, 0, 1.0, 0.0137)] * 2
    filters += [(2.0, 0, 0.9137, 0.0), (1.0, 9, 0.9137, 0.0), (1.0, 0, 1.0, 0.0)]
    rows = Rows(filters)
    logits = torch.randn(len(filters), VOCAB, generator=torch.Generator().manual_seed(4)) * 2
    logits[-1, 77], logits[-2, 4097], logits[-3, 9000] = torch.nan, torch.inf, -torch.inf
    got = kernels.sample_likely(logits, rows.temperature, *rows.keys, *rows.columns[1:])
    want = reference.sample_likely(logits, rows.temperature, *rows.keys, *rows.columns[1:])
    assert got.tolist() == want.tolist()
    assert got[-3:].tolist() == [-1, -1, -1]
    assert got[1:3].tolist() == logits[1:3].argmax(1).tolist()
    assert got[0] == sample(logits[:1], rows.temperature[:1], *[key[:1] for key in rows.keys])
    assert len(set(got.tolist())) > 7
    columns = [column[5:6] for column in (rows.temperature, *rows.keys, *rows.columns[1:])]
    assert kernels.sample_likely(logits[5:6], *columns) == got[5], "a neighbour moves it"


def test_no_equal_behind_the_border_is_drawn(kernels: ModuleType) -> None:
    rows = Rows([(1.0, 3, 1.0, 0.0)] * 20 + [(1.0, 0, 0.0537, 0.0)] * 20)
    columns = (rows.temperature, *rows.keys, *rows.columns[1:])
    drawn = kernels.sample_likely(torch.zeros(40, 50), *columns).tolist()
    assert set(drawn[:20]) == set(drawn[20:]) == {0, 1, 2}


quantized = st.lists(st.integers(-7, 7).map(lambda n: n * 0.5), min_size=12, max_size=12)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(
        st.tuples(
            quantized,
            st.tuples(
                st.sampled_from([0.1, 1.0, 7.0]),
                st.integers(0, 14),
                st.sampled_from([1.0, 0.9137, 0.5137, 0.0137]),
                st.sampled_from([0.0, 0.1137, 1.0]),
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_ties_and_few_tokens(
    kernels: ModuleType, rows: list[tuple[list[float], tuple[float, int, float, float]]]
) -> None:
    logits = torch.tensor([values for values, _ in rows])
    assert_kept_alike(kernels, logits, Rows([filters for _, filters in rows]))
