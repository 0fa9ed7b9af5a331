"""The Triton kernels that choose tokens, in their interpreter against their references."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from service.kernels.greedy import reference as greedy_reference
from service.kernels.sample import reference
from tests.kernels.interpreter import interpreted

VOCAB = 9001  # three chunks, the last one short


@pytest.fixture(scope="module")
def greedy() -> Iterator[ModuleType]:
    with interpreted("service.kernels.greedy.triton") as module:
        yield module


@pytest.fixture(scope="module")
def sample(greedy: ModuleType) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "service.kernels.greedy.triton", greedy)
        with interpreted("service.kernels.sample.triton") as module:
            yield module


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy(greedy: ModuleType, dtype: torch.dtype) -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1)).to(dtype)
    logits[5] -= 20  # a sum beyond what float16 holds
    logits[0, 8999] = logits[0, 4097] = logits[0, 4099] = 60.0  # between equals the first
    logits[1, VOCAB - 1] = 60.0
    logits[2, 5] = float("nan")
    logits[3, 9000] = float("inf")
    logits[4, 4096] = float("-inf")
    got = greedy.greedy(logits)
    assert got.tolist() == greedy_reference.greedy(logits).tolist()
    assert got[5] == logits[5].argmax()
    assert got.tolist()[:5] == [4097, VOCAB - 1, -1, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_the_references(sample: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = 48
    logits = (torch.randn(rows, VOCAB, generator=generator) * 3).to(dtype)
    logits[5, :4100] = torch.finfo(dtype).min  # a chunk without mass in front
    logits[6, 4090:] = torch.finfo(dtype).min
    logits[7, 77] = float("nan")
    temperature = torch.rand(rows, generator=generator) * 2
    temperature[8], temperature[9], temperature[10] = 0.0, 1e-38, 100.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 2**20, (rows,), generator=generator)
    samples = torch.randint(0, 128, (rows,), generator=generator)
    got = sample.sample(logits, temperature, seeds, positions, samples)
    want = reference.sample(logits, temperature, seeds, positions, samples)
    assert got.tolist() == want.tolist()
    assert got[7] == -1
    assert got[5] >= 4100
    assert got[6] < 4090
    assert got[8] == logits[8].argmax()


def test_what_has_no_mass_is_never_drawn(sample: ModuleType) -> None:
    logits = torch.full((64, VOCAB), torch.finfo(torch.float32).min)
    logits[:, 4097] = logits[:, 17] = 0.0
    count = torch.arange(64)
    got = sample.sample(logits, torch.ones(64), count, count, count)
    assert set(got.tolist()) == {17, 4097}
