"""The Triton kernels of penalties, biases and counts in their interpreter, against their references."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.kernels.shape_logits import GENERATED, NEUTRAL, reference
from tests.kernels.interpreter import interpreted

VOCAB = 9001  # three chunks, the last one short
TABLE_ROWS = 6
PLACES = 300


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.shape_logits.triton") as module:
        yield module


@pytest.fixture
def tables() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows 0 and 5 ask for nothing."""
    generator = torch.Generator().manual_seed(4)
    occurrences = torch.randint(0, 7, (TABLE_ROWS, VOCAB), generator=generator, dtype=torch.int32)
    occurrences *= torch.rand(TABLE_ROWS, VOCAB, generator=generator) < 0.2
    factors = torch.tensor(
        [NEUTRAL, (1.5, 0.75, -2, 1), (0.25, 0, 0, 1), (1, -1.5, 2, 1), (10, 2, 2, 1), NEUTRAL]
    )
    bias_ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:PLACES] for _ in range(TABLE_ROWS)])
    biases = torch.randn(TABLE_ROWS, PLACES, generator=generator) * 50
    biases[:, 200:] = 0
    bias_ids[:, 200:] = 0
    biases[[0, 5]] = 0
    biases[2] = 0
    return occurrences, factors, bias_ids, biases


def test_shape_logits(kernels: ModuleType, tables: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.tensor([3, 0, 4, 1, 5, 5, 2], dtype=torch.int32)
    logits = torch.randn(len(rows), VOCAB, generator=generator) * 8
    logits[0, 7], logits[2, 9000], logits[4, 0] = float("nan"), float("inf"), -0.0
    want, got = logits.clone(), logits.clone()
    reference.shape_logits(want, rows, *tables)
    kernels.shape_logits(got, rows, *tables)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-5, equal_nan=True)
    for place in (1, 4, 5):
        assert torch.equal(got[place], logits[place]), "who asks for nothing keeps his logits"
    for place in (0, 2, 3, 6):
        assert (got[place] != logits[place]).sum() > 1000
    for place in range(len(rows)):
        alone = logits[place : place + 1].clone()
        kernels.shape_logits(alone, rows[place : place + 1], *tables)
        assert torch.equal(alone[0].nan_to_num(9), got[place].nan_to_num(9)), "a neighbour moves it"


def test_count_tokens(kernels: ModuleType, tables: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    occurrences, factors, *_ = tables
    rows = torch.tensor([5, 1, 4, 2, 5, 3], dtype=torch.int32)
    token_ids = torch.tensor([3, 9000, -1, 0, 3, 17])
    want, got = occurrences.clone(), occurrences.clone()
    reference.count_tokens(want, rows, factors, token_ids)
    kernels.count_tokens(got, rows, factors, token_ids)
    assert torch.equal(got, want)
    changed = (got - occurrences).nonzero().tolist()
    assert changed == [[1, 9000], [2, 0], [3, 17]]
    assert (got - occurrences).sum() == 3 * GENERATED
