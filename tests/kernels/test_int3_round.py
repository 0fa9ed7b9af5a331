"""Rounding to three bits: Triton's kernel, in its interpreter, takes what the reference takes."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from service.kernels.int3_round import reference
from tests.kernels.interpreter import interpreted

Rounded = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    """What is no number is no accident here."""
    with interpreted("service.kernels.int3_round.triton") as module, np.errstate(invalid="ignore"):
        yield module


def error(weight: Tensor, rounded: Rounded, group_size: int) -> Tensor:
    """float64 [out, groups]: what the search makes least."""
    grouped, codes = (part.double().unflatten(1, (-1, group_size)) for part in (weight, rounded[0]))
    zeros, scales = (part.double()[..., None] for part in rounded[1:])
    span = grouped.amax(-1, keepdim=True).clamp(min=0) - grouped.amin(-1, keepdim=True).clamp(max=0)
    left = ((codes - zeros) * scales - grouped) / torch.where(span == 0, 1.0, span)
    return left.pow(reference.ERROR_POWER).sum(-1)


def check_as_good(weight: Tensor, got: Rounded, want: Rounded, group_size: int) -> float:
    """The same where no two clippings tie, and there one that errs as little; -> share of other groups."""
    differs = (got[1] != want[1]) | (got[2] != want[2])
    same_codes = (got[0] == want[0]).unflatten(1, (-1, group_size)).all(-1)
    assert (same_codes | differs).all()
    ours, best = error(weight, got, group_size), error(weight, want, group_size)
    torch.testing.assert_close(ours[differs], best[differs], rtol=1e-5, atol=0)
    return float(differs.float().mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [64, 128])
def test_random_weights(kernels: ModuleType, group_size: int, dtype: torch.dtype) -> None:
    """A number of groups that fills no program."""
    generator = torch.Generator().manual_seed(group_size)
    weight = torch.randn(45, 3 * group_size, generator=generator)
    for each in (weight * 0.02, weight.pow(3), weight.abs(), weight - 5):
        told = each.to(dtype)
        got, want = kernels.round_groups(told, group_size), reference.round_groups(told, group_size)
        assert [part.dtype for part in got] == [part.dtype for part in want]
        assert check_as_good(told, got, want, group_size) < 0.02


def test_groups_made_to_be_hard(kernels: ModuleType) -> None:
    """Nothing, one value, halves between codes, a range of subnormals, one that a scale cannot hold."""
    ramp = torch.arange(64, dtype=torch.float32)
    rows = [
        torch.zeros(64), torch.full((64,), 0.25), torch.full((64,), -0.25), torch.full((64,), 1e-30),
        ramp % 15 / 2, 3.5 - ramp % 15 / 2, ramp % 8, -(ramp % 8), (ramp % 2) * 2 - 1,
        torch.where(ramp == 5, 1.0, 0.0), torch.where(ramp == 5, -1.0, 1e-3 * ramp),
        (ramp - 32) * 6e-8, (ramp - 20) * 1e-8, (ramp - 32) * 1e-40, ramp * 7200, ramp * 1000,
        (ramp - 32) * 1e6,
    ]  # fmt: skip
    weight = torch.stack(rows)
    got, want = kernels.round_groups(weight, 64), reference.round_groups(weight, 64)
    whole = want[2].isfinite().all(-1)
    assert whole.sum() == len(rows) - 1
    assert torch.equal(got[2].isfinite(), want[2].isfinite())
    held = [[part[whole] for part in rounded] for rounded in (got, want)]
    check_as_good(weight[whole], *map(tuple, held), 64)  # type: ignore[arg-type]
    assert (got[0][0] == got[1][0]).all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_has_no_scale(kernels: ModuleType, broken: float) -> None:
    weight = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    weight[1, 70] = broken
    for scales in (kernels.round_groups(weight, 64)[2], reference.round_groups(weight, 64)[2]):
        assert scales.isfinite().tolist() == [[True, True], [True, False], [True, True]]
