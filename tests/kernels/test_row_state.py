"""Rows of running requests read and written: the definition by hand, and the Triton kernels against it."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.kernels.row_state import read_rows, reference, write_rows
from tests.kernels.interpreter import interpreted

PAGE = 16
PADDING = 5


@pytest.fixture(scope="module")
def triton() -> Iterator[ModuleType]:
    with interpreted("service.kernels.row_state.triton") as module:
        yield module


def state(num_blocks: int) -> tuple[Tensor, Tensor]:
    """Five requests and padding, each with its own blocks."""
    generator = torch.Generator().manual_seed(1)
    fields = torch.zeros(PADDING + 1, 12, dtype=torch.int32)
    fields[:PADDING, 0] = torch.tensor([0, 15, 16, 40, num_blocks * PAGE - 1])
    fields[:PADDING, 1] = torch.tensor([7, 8, 9, 10, 11])
    tables = torch.randint(1, 1 << 20, (PADDING + 1, num_blocks), generator=generator, dtype=torch.int32)
    tables[PADDING] = 0
    return fields, tables


def test_a_row_says_what_is_computed_and_where() -> None:
    fields, tables = state(4)
    token_ids, positions, slots, lengths, blocks = read_rows(
        fields, tables, torch.tensor([3, 1, 5], dtype=torch.int32), PAGE
    )
    assert token_ids.tolist() == [10, 8, 0]
    assert positions.tolist() == [40, 15, 0]
    assert slots.tolist() == [int(tables[3, 2]) * PAGE + 8, int(tables[1, 0]) * PAGE + 15, 0]
    assert lengths.tolist() == [41, 16, 1]
    assert torch.equal(blocks, tables[[3, 1, 5]])


def test_a_written_row_is_one_token_longer_and_padding_is_not() -> None:
    fields, _ = state(4)
    write_rows(fields, torch.tensor([3, 1, 5, 5], dtype=torch.int32), torch.tensor([99, -1, 3, 3]), PADDING)
    assert fields[:, 0].tolist() == [0, 16, 16, 41, 63, 0]
    assert fields[[0, 1, 2, 3, 4], 1].tolist() == [7, 0, 9, 99, 11]
    assert not fields[:, 2:].any()


@pytest.mark.parametrize("num_blocks", [3, 300])
def test_the_kernels_are_the_reference(triton: ModuleType, num_blocks: int) -> None:
    """Tables longer than what is copied at a time, and tables cut to the longest row's need."""
    fields, tables = state(num_blocks)
    rows = torch.tensor([4, 2, 0, 1, 3, 5, 5], dtype=torch.int32)
    for width in (num_blocks, 3):
        chosen = rows if width == num_blocks else rows[1:]
        got = triton.read_rows(fields, tables[:, :width], chosen, PAGE)
        want = reference.read_rows(fields, tables[:, :width], chosen, PAGE)
        for ours, theirs in zip(got[:4], want[:4], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        assert got[4].is_contiguous()
        for ours, theirs, length in zip(got[4], want[4], got[3].tolist(), strict=True):
            needed = -(-length // PAGE)
            assert torch.equal(ours[:needed], theirs[:needed])
    drawn = torch.tensor([1, 2, -1, 4, 5, 6, 6])
    ours, theirs = fields.clone(), fields.clone()
    triton.write_rows(ours, rows, drawn, PADDING)
    reference.write_rows(theirs, rows, drawn, PADDING)
    assert torch.equal(ours, theirs)
