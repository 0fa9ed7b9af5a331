"""INT3's codes: how many bits they take, how well they are chosen, and what has no place in the layout."""

import pytest
import torch
from torch import Tensor

from service.errors import PrecisionError
from service.kernels.int3_round import reference, round_groups
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.linear import LinearSpec
from service.precision.options import INT3_GROUPS

CPU = torch.device("cpu")


def group_of(in_features: int, *outs: int) -> LinearGroup:
    parts = tuple(LinearSpec(f"part{number}", in_features, out) for number, out in enumerate(outs))
    return LinearGroup("qkv_proj", parts, CPU, torch.bfloat16)


def random_weights(group: LinearGroup, spread: float = 0.05) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{part.path}.weight": torch.randn(part.out_features, part.in_features, generator=generator) * spread
        for part in group.parts
    }


@pytest.mark.parametrize(("precision", "bits"), [("int3", 3 + 20 / 64), ("int3:group=128", 3 + 20 / 128)])
def test_the_ledger_has_the_bits_that_are_said(precision: str, bits: float) -> None:
    """README.md: 3.313 and 3.156 bits a weight."""
    group = group_of(1024, 256, 64, 96)
    layer = load_backend(precision).build(group, random_weights(group).__getitem__)
    assert 8 * sum(layer.bytes().values()) / (1024 * 416) == pytest.approx(bits, rel=1e-9)
    assert round(bits, 4) in (3.3125, 3.1562)


def error_of(weight: Tensor, group_size: int) -> float:
    """Of the power that the search is for, relative to the largest weight."""
    codes, zeros, scales = round_groups(weight, group_size)
    centred = codes.unflatten(1, (-1, group_size)).float() - zeros.float()[..., None]
    meant = (centred * scales.float()[..., None]).flatten(1)
    return float((meant - weight).norm(reference.ERROR_POWER) / weight.abs().max())


@pytest.mark.parametrize("group_size", INT3_GROUPS)
def test_clipping_is_worth_its_search(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same rounding of the whole range, on normal weights."""
    weight = random_weights(group_of(512, 256))["part0.weight"]
    searched = error_of(weight, group_size)
    monkeypatch.setattr(reference, "CLIPPINGS", (1.0,))
    assert 0.1 < searched < 0.97 * error_of(weight, group_size)


def test_no_group_is_worse_than_unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weights(group_of(512, 64))["part0.weight"].pow(3)
    rows = [error_of(row[None], 64) for row in weight]
    monkeypatch.setattr(reference, "CLIPPINGS", (1.0,))
    assert all(got <= error_of(row[None], 64) for got, row in zip(rows, weight, strict=True))


def test_rows_are_rounded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weights(group_of(128, 96))["part0.weight"]
    whole = round_groups(weight, 64)
    monkeypatch.setattr(reference, "WEIGHTS_AT_ONCE", 7 * 128)
    for got, want in zip(round_groups(weight, 64), whole, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1e-30])
def test_a_group_of_one_value(value: float) -> None:
    """Zeros stay zeros, and what a scale can hold comes back."""
    group = group_of(64, 32)
    layer = load_backend("int3").build(group, lambda _: torch.full((32, 64), value))
    want = torch.full((32, 64), value if abs(value) > 1e-20 else 0.0)
    torch.testing.assert_close(layer.dense(0), want, rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("precision", "in_features", "outs", "named"),
    [
        ("int3", 96, (64,), "in_features divisible by its group of 64"),
        ("int3:group=128", 192, (64,), "`part0` has 192"),
        ("int3", 64, (64, 40), "`part1` has 40"),
    ],
)
def test_shapes_without_a_place_are_refused(
    precision: str, in_features: int, outs: tuple[int, ...], named: str
) -> None:
    group = group_of(in_features, *outs)
    with pytest.raises(PrecisionError) as error:
        load_backend(precision).build(group, random_weights(group).__getitem__)
    assert named in error.value.message
    assert ("int3:group=64" in error.value.hint) == (precision == "int3:group=128")


def test_weights_beyond_a_scale_are_refused() -> None:
    group = group_of(64, 32)
    with pytest.raises(PrecisionError, match=r"`part0\.weight`"):
        load_backend("int3").build(group, random_weights(group, 1e6).__getitem__)
