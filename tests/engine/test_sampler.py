"""Draws against distributions computed by definition, and independence of a row from its neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.engine.sampler import BAD_ROW, SamplingRows, Variant, draw, logprobs
from service.kernels.philox import uniform
from service.kernels.sample_likely import kept, reference


def rows_of(
    variant: Variant,
    count: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    start: int = 0,
) -> SamplingRows:
    return SamplingRows(
        variant,
        torch.full((count,), temperature),
        torch.full((count,), seed),
        torch.arange(start, start + count),
        torch.zeros(count, dtype=torch.int64),
        torch.full((count,), top_k),
        torch.full((count,), top_p, dtype=torch.float64),
        torch.full((count,), min_p, dtype=torch.float64),
    )


def stack(parts: list[SamplingRows], variant: Variant) -> SamplingRows:
    columns = zip(*[list(vars(part).values())[1:] for part in parts], strict=True)
    return SamplingRows(variant, *(torch.cat(column) for column in columns))


def kept_by_definition(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Sorted by (probability, id); top-k, then the shortest beginning with enough mass, then min-p."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: top_k or len(order)]
    weights = [math.exp(logits[i]) for i in order]
    mass, chosen = 0.0, []
    for i, weight in zip(order, weights, strict=True):
        if top_p < 1 and chosen and mass >= top_p * math.fsum(weights):
            break
        chosen.append(i)
        mass += weight
    return {i for i in chosen if math.exp(logits[i]) >= min_p * weights[0]}


# multiples of 0.5 bring ties; 0.137 keeps sums away from the exact share of a top-p
quantized = st.lists(st.integers(-6, 6).map(lambda n: n * 0.5), min_size=12, max_size=12)


@settings(max_examples=200)
@given(
    quantized,
    st.integers(0, 14),
    st.sampled_from([1.0, 0.9137, 0.5137, 0.0137]),
    st.sampled_from([0.0, 0.1137]),
)
def test_filters_keep_what_their_definition_keeps(
    logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    scaled = torch.tensor([logits]) - max(logits)
    rows = rows_of("full", 1, top_k=top_k, top_p=top_p, min_p=min_p)
    got = kept(scaled, rows.top_k, rows.top_p, rows.min_p)[0].nonzero().flatten().tolist()
    assert set(got) == kept_by_definition(logits, min(top_k, 12), top_p, min_p)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.99), (700, 1.0), (700, 0.9), (5, 0.5), (0, 1.0)])
def test_narrow_looks_at_the_vocabulary_change_nothing(
    monkeypatch: pytest.MonkeyPatch, top_k: int, top_p: float
) -> None:
    """The widths tried before the whole vocabulary save time only."""
    scaled = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    scaled -= scaled.amax(-1, keepdim=True)
    rows = rows_of("full", 3, top_k=top_k, top_p=top_p)
    by_width = []
    for widths in [(), (8, 64), (256,)]:
        monkeypatch.setattr(reference, "NUCLEUS_WIDTHS", widths)
        by_width.append(kept(scaled, rows.top_k, rows.top_p, rows.min_p))
    assert torch.equal(by_width[0], by_width[1])
    assert torch.equal(by_width[0], by_width[2])
    assert by_width[0][0].sum() == (len(kept_by_definition(scaled[0].tolist(), top_k, top_p, 0.0)))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.7, 6, 1.0), (1.0, 0, 0.8)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """40,000 positions of one seed: each token's share within five standard deviations."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -3.0, 0.2])
    count = 40_000
    drawn = draw(logits.expand(count, -1), rows_of("full", count, temperature, top_k, top_p, seed=11))
    scaled = (logits / temperature).tolist()
    chosen = kept_by_definition(scaled, top_k, top_p, 0.0)
    weights = [math.exp(x) if i in chosen else 0.0 for i, x in enumerate(scaled)]
    for token, weight in enumerate(weights):
        share = weight / math.fsum(weights)
        got = (drawn == token).double().mean().item()
        assert abs(got - share) <= 5 * math.sqrt(share * (1 - share) / count)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2))
    rows = rows_of("temperature", 50, seed=-5)
    drawn = draw(logits, rows)
    shares = uniform(rows.seeds, rows.positions, rows.sample_indices)
    for row in range(50):
        cumulative = logits[row].double().softmax(-1).cumsum(0)
        token = int(drawn[row])
        assert cumulative[token] >= shares[row] - 1e-6
        assert token == 0 or cumulative[token - 1] <= shares[row] + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.7, 1.3]),
            st.sampled_from([0, 3, 40]),
            st.sampled_from([1.0, 0.9]),
            st.sampled_from([0.0, 0.2]),
            st.integers(-(2**63), 2**63 - 1),
        ),
        min_size=2,
        max_size=7,
    )
)
def test_a_row_does_not_depend_on_its_neighbours(
    parameters: list[tuple[float, int, float, float, int]],
) -> None:
    """Alone under the least variant that serves it, or among rows that force a fuller one: the same token."""
    generator = torch.Generator().manual_seed(len(parameters))
    logits = torch.randn(len(parameters), 600, generator=generator)
    parts = [
        rows_of("full", 1, t, k, p, m, seed, place) for place, (t, k, p, m, seed) in enumerate(parameters)
    ]
    together = draw(logits, stack(parts, "full"))
    for row, (temperature, top_k, top_p, min_p, _) in enumerate(parameters):
        variant: Variant = "full" if top_k or top_p < 1 or min_p else "temperature"
        alone = stack([parts[row]], variant if temperature else "greedy")
        assert draw(logits[row : row + 1], alone).item() == together[row]


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    logits = torch.tensor([[1.0, 300.0, 200.0]])
    assert draw(logits, rows_of("full", 1, temperature)).item() == 1


@pytest.mark.parametrize("variant", ["greedy", "temperature", "full"])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_gives_no_token(variant: Variant, broken: float) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    wanted = draw(logits, rows_of(variant, 3, top_k=4)).tolist()
    logits[1, 7] = broken
    assert draw(logits, rows_of(variant, 3, top_k=4)).tolist() == [wanted[0], BAD_ROW, wanted[2]]


def test_suppressed_ids_are_never_drawn() -> None:
    logits = torch.zeros(200, 4)
    before = logits.clone()
    suppressed = ([row for row in range(200) for _ in range(2)], [1, 2] * 200)
    drawn = draw(logits, rows_of("full", 200), suppressed)
    assert set(drawn.tolist()) == {0, 3}
    assert torch.equal(logits, before)


def test_logprobs_rank_ties_like_the_sampler() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0]])
    found = logprobs(logits, torch.tensor([2]), 4)
    wanted: Tensor = logits.log_softmax(-1)
    assert found.ranks.tolist() == [3]
    assert found.chosen.item() == pytest.approx(wanted[0, 2].item())
    assert found.top_ids.tolist() == [[1, 3, 2, 4]]
    assert found.top_logprobs[0].tolist() == pytest.approx(wanted[0, [1, 3, 2, 4]].tolist())
