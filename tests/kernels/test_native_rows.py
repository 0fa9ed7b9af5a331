"""The C kernels for rows against their torch references: add and norm, rotary and KV, gate, greedy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.add_rms_norm import reference as norm_reference
from service.kernels.gated_silu import gated_silu
from service.kernels.gated_silu import reference as silu_reference
from service.kernels.greedy import greedy
from service.kernels.greedy import reference as greedy_reference
from service.kernels.native import absence, load
from service.kernels.rotary_kv import reference as rotary_reference
from service.kernels.rotary_kv import rotary_kv

pytestmark = pytest.mark.skipif(load() is None, reason=absence())

BFLOAT16 = torch.bfloat16
ROUNDING = 2.0**-8  # half a unit in the last place of bfloat16, relative
NUM_BLOCKS = 6
BLOCK_TOKENS = 16

rows = st.integers(1, 40)
seeds = st.integers(0, 999)


def bits(x: Tensor) -> Tensor:
    """Comparable bit for bit, all NaN as one."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int16)


@settings(max_examples=80, deadline=None)
@given(
    num_rows=rows,
    columns=st.integers(1, 700),
    magnitude=st.integers(-3, 3),
    has_delta=st.booleans(),
    seed=seeds,
)
def test_norm_equals_reference(
    num_rows: int, columns: int, magnitude: int, has_delta: bool, seed: int
) -> None:
    """The sum bit for bit; the norm within a unit of each rounding: its sum has another order."""
    torch.manual_seed(seed)
    hidden, delta = (torch.randn(2, num_rows, columns) * 10.0**magnitude).to(BFLOAT16)
    weight = torch.randn(columns).to(BFLOAT16)
    total, normed = add_rms_norm(hidden, delta if has_delta else None, weight, 1e-5)
    expected_total, expected = norm_reference.add_rms_norm(hidden, delta if has_delta else None, weight, 1e-5)
    assert torch.equal(total, expected_total)
    moved = (normed.float() - expected.float()).abs() > 0
    assert torch.all((normed.float() - expected.float()).abs() <= 4 * ROUNDING * expected.float().abs())
    assert moved.float().mean() <= 0.02 + 1 / moved.numel()


def test_norm_moves_hardly_a_number() -> None:
    torch.manual_seed(0)
    hidden, delta = torch.randn(2, 512, 576).to(BFLOAT16)
    weight = torch.randn(576).to(BFLOAT16)
    _, normed = add_rms_norm(hidden, delta, weight, 1e-5)
    _, expected = norm_reference.add_rms_norm(hidden, delta, weight, 1e-5)
    assert (normed != expected).float().mean() < 1e-4


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan])
def test_norm_passes_broken_numbers_on(broken: float) -> None:
    hidden = torch.ones(3, 37, dtype=BFLOAT16)
    hidden[1, 36] = broken
    weight = torch.full((37,), 2.0, dtype=BFLOAT16)
    for got, expected in zip(
        add_rms_norm(hidden, hidden, weight, 1e-5),
        norm_reference.add_rms_norm(hidden, hidden, weight, 1e-5),
        strict=True,
    ):
        assert torch.equal(bits(got), bits(expected))


def test_gate_equals_reference_for_every_bfloat16() -> None:
    """Bit for bit: subnormal numbers, infinities and every NaN are among the gates."""
    gates = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BFLOAT16)
    for up in (1.0, -3.0, 1e30, 0.0):
        gate_up = torch.cat((gates, torch.full_like(gates, up))).view(1, -1)
        assert torch.equal(bits(gated_silu(gate_up)), bits(silu_reference.gated_silu(gate_up)))


@settings(max_examples=40, deadline=None)
@given(num_rows=rows, columns=st.integers(1, 700), seed=seeds)
def test_gate_is_rounded_once(num_rows: int, columns: int, seed: int) -> None:
    torch.manual_seed(seed)
    gate_up = (torch.randn(num_rows, 2 * columns) * 5).to(BFLOAT16)
    gate, up = gate_up.double().chunk(2, -1)
    exact = gate * torch.sigmoid(gate) * up
    error = (gated_silu(gate_up).double() - exact).abs()
    assert torch.all(error <= (1 + 1e-4) * ROUNDING * exact.abs() + 1e-40)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 30),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([32, 64, 96, 128, 256]),
    is_normed=st.booleans(),
    is_turned=st.booleans(),
    seed=seeds,
)
def test_rotary_equals_reference(
    tokens: int, heads: int, kv_heads: int, head_dim: int, is_normed: bool, is_turned: bool, seed: int
) -> None:
    """Without norms bit for bit; whatever is not a slot of the step stays as it was."""
    torch.manual_seed(seed)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(BFLOAT16)
    cos, sin = torch.randn(2, 50, head_dim)
    norms = torch.randn(2, head_dim).to(BFLOAT16)
    positions = torch.randint(0, 50, (tokens,))
    slots = torch.randperm(NUM_BLOCKS * BLOCK_TOKENS)[:tokens]
    caches = torch.randn(2, NUM_BLOCKS, kv_heads, BLOCK_TOKENS, head_dim).to(BFLOAT16)
    expected_caches = caches.clone()
    q_norm, k_norm = norms if is_normed else (None, None)
    cosines, sines = (cos, sin) if is_turned else (None, None)
    shared = (qkv, cosines, sines, positions, slots, q_norm, k_norm, 1e-6)
    q = rotary_kv(*shared, *caches)
    expected = rotary_reference.rotary_kv(*shared, *expected_caches)
    assert q.shape == (tokens, heads, head_dim)
    assert q.is_contiguous()
    pairs = [(q, expected), (caches[0], expected_caches[0])]
    assert torch.equal(caches[1], expected_caches[1])
    for got, wanted in pairs:
        if is_normed:  # a rounding of the norm may fall the other way, and is then turned
            assert (got != wanted).float().mean() < 0.02
            assert float((got - wanted).float().norm() / wanted.float().norm()) < 2e-3
        else:
            assert torch.equal(got, wanted)


def test_rotary_is_served_wherever_positions_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode's were a column, which from two rows on went to torch: a norm may round otherwise there."""
    monkeypatch.setattr(rotary_reference, "rotary_kv", None)
    torch.manual_seed(0)
    qkv, norm = torch.randn(5, 6 * 64).to(BFLOAT16), torch.randn(64).to(BFLOAT16)
    cos, sin = torch.randn(2, 50, 64)
    places = torch.tensor([[3, 7], [9, 1], [0, 20], [49, 2], [8, 8]])

    def rotated(positions: Tensor, slots: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        caches = torch.zeros(2, NUM_BLOCKS, 1, BLOCK_TOKENS, 64).to(BFLOAT16)
        return rotary_kv(qkv[rows], cos, sin, positions, slots, norm, norm, 1e-6, *caches), caches

    q, caches = rotated(places[:, 0], places[:, 1], slice(5))
    wanted, wanted_caches = rotated(*places.t().contiguous(), slice(5))
    assert torch.equal(q, wanted)
    assert torch.equal(caches, wanted_caches)
    assert torch.equal(rotated(places[1:2, 0], places[1:2, 1], slice(1, 2))[0], q[1:2])


@pytest.mark.parametrize(("position", "slot"), [(50, 0), (-1, 0), (0, NUM_BLOCKS * BLOCK_TOKENS), (0, -1)])
def test_rotary_refuses_what_lies_outside_the_tables(position: int, slot: int) -> None:
    caches = torch.zeros(2, NUM_BLOCKS, 1, BLOCK_TOKENS, 32, dtype=BFLOAT16)
    qkv, (cos, sin) = torch.ones(2, 3 * 32, dtype=BFLOAT16), torch.ones(2, 50, 32)
    positions, slots = torch.tensor([0, position]), torch.tensor([1, slot])
    with pytest.raises(IndexError, match="token 1: position"):
        rotary_kv(qkv, cos, sin, positions, slots, None, None, 1e-6, *caches)
    assert not caches.any()


def test_neighbours_move_no_row() -> None:
    torch.manual_seed(0)
    hidden, delta = torch.randn(2, 33, 577).to(BFLOAT16)
    weight = torch.randn(577).to(BFLOAT16)
    total, normed = add_rms_norm(hidden, delta, weight, 1e-5)
    gated = gated_silu(hidden[:, :576].contiguous())
    for row in range(33):
        one = slice(row, row + 1)
        alone_total, alone = add_rms_norm(hidden[one], delta[one], weight, 1e-5)
        assert torch.equal(total[one], alone_total)
        assert torch.equal(normed[one], alone)
        assert torch.equal(gated[one], gated_silu(hidden[one, :576].contiguous()))


@settings(max_examples=60, deadline=None)
@given(num_rows=st.integers(1, 5), vocab=st.integers(1, 300), levels=st.integers(1, 50), seed=seeds)
def test_greedy_takes_the_first_of_the_largest(num_rows: int, vocab: int, levels: int, seed: int) -> None:
    """Few levels: many logits are equal."""
    torch.manual_seed(seed)
    logits = torch.randint(-levels, levels, (num_rows, vocab)).float()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert greedy(logits).tolist() == expected
    assert greedy_reference.greedy(logits).tolist() == expected


@pytest.mark.parametrize("broken", [torch.inf, -torch.inf, torch.nan, -torch.nan])
@pytest.mark.parametrize("place", [0, 15, 16, 99])
def test_greedy_marks_a_broken_row_only(broken: float, place: int) -> None:
    logits = torch.zeros(3, 100)
    logits[1, place] = broken
    logits[2, 7] = torch.finfo(torch.float32).max
    assert greedy(logits).tolist() == [0, -1, 7]
    assert greedy_reference.greedy(logits).tolist() == [0, -1, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_types_are_the_references(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, delta = torch.randn(2, 3, 20).to(dtype)
    weight = torch.randn(20).to(dtype)
    for got, expected in zip(
        add_rms_norm(hidden, delta, weight, 1e-5),
        norm_reference.add_rms_norm(hidden, delta, weight, 1e-5),
        strict=True,
    ):
        assert torch.equal(got, expected)
    assert torch.equal(gated_silu(hidden), silu_reference.gated_silu(hidden))
    assert torch.equal(greedy(hidden), greedy_reference.greedy(hidden))


def test_other_layouts_are_the_references() -> None:
    """A transposed or cut tensor has gaps that the C code does not know."""
    torch.manual_seed(0)
    whole = torch.randn(20, 6).to(BFLOAT16)
    weight = torch.randn(20).to(BFLOAT16)
    for hidden in (whole.t(), torch.randn(6, 40).to(BFLOAT16)[:, :20]):
        total, normed = add_rms_norm(hidden, None, weight, 1e-5)
        assert torch.equal(total, hidden)
        assert torch.equal(normed, norm_reference.add_rms_norm(hidden, None, weight, 1e-5)[1])
        assert torch.equal(gated_silu(hidden), silu_reference.gated_silu(hidden))
    logits = torch.randn(20, 6).t()
    assert torch.equal(greedy(logits), logits.argmax(-1))
