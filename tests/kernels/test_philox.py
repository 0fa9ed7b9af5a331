"""Philox4x32-10 against published vectors and a second, scalar implementation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from service.kernels.philox import philox4x32, uniform

# The known answers that the authors publish with Random123 (kat_vectors): counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
words = st.integers(0, 2**32 - 1)


def column(text: str) -> torch.Tensor:
    return torch.tensor([[int(word, 16)] for word in text.split()])


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's rounds on Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_published_known_answers(counter: str, key: str, result: str) -> None:
    assert torch.equal(philox4x32(column(counter), column(key)), column(result))


@given(st.lists(st.tuples(*[words] * 6), min_size=1, max_size=9))
def test_agrees_with_scalar_rounds(rows: list[tuple[int, ...]]) -> None:
    table = torch.tensor(rows).T
    got = philox4x32(table[:4], table[4:])
    assert got.T.tolist() == [scalar_philox(list(row[:4]), list(row[4:])) for row in rows]


@given(st.integers(-(2**63), 2**63 - 1), words, st.integers(0, 127), st.integers(0, 3))
def test_uniform_is_a_function_of_its_row_alone(seed: int, position: int, sample: int, stream: int) -> None:
    """Neighbours in the batch change nothing, and the seed's upper half counts."""

    def draw(*rows: tuple[int, int, int]) -> list[float]:
        return uniform(*torch.tensor(rows).T, stream=stream).tolist()

    row = (seed, position, sample)
    alone = draw(row)[0]
    assert 0.0 < alone < 1.0
    assert draw((7, 1, 0), row, (seed, position ^ 1, sample))[1] == alone
    key = [seed % 2**32, (seed >> 32) % 2**32]
    assert alone == (scalar_philox([position, sample, stream, 0], key)[0] + 0.5) / 2**32


def test_uniform_fills_the_interval_evenly() -> None:
    """65,536 positions of one seed: chi-square over 64 bins stays under its 1e-6 quantile."""
    position = torch.arange(65536)
    draws = uniform(torch.full_like(position, 1234), position, torch.zeros_like(position))
    counts = torch.histc(draws, bins=64, min=0, max=1)
    assert ((counts - 1024) ** 2 / 1024).sum() < 130
