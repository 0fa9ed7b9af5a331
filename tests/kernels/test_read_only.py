"""The kernel that only reads reads everything: what it returns adds up to the numbers that it was given."""

import pytest
import torch

from service.kernels.read_only import SHAPES, ways_to_read
from tests.kernels.interpreter import interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("num_words", [1, 2048, 30_001])
def test_every_number_is_read_once(num_words: int) -> None:
    words = torch.arange(1, num_words + 1, dtype=torch.float64).fmod(97).float()
    with interpreted("service.kernels.read_only.triton") as module:
        for tile, warps, _ in SHAPES:
            for programs in (3, 500):
                sums = module.reader(torch.device("cpu"), tile, warps, programs)(words)
                assert sums.sum() == words.sum()
    assert [way(words) == words.sum() for way in ways_to_read(torch.device("cpu"))] == [True]
