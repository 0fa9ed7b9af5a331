"""The Triton kernels around the linears in their interpreter against their references."""

from collections.abc import Iterator
from contextlib import ExitStack
from types import ModuleType

import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm import reference as norm_reference
from service.kernels.gated_silu import reference as silu_reference
from service.kernels.rotary_kv import reference as rotary_reference
from tests.kernels.interpreter import interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[str, ModuleType]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(interpreted(f"service.kernels.{name}.triton"))
            for name in ("add_rms_norm", "gated_silu", "rotary_kv")
        }


def assert_rounded_alike(got: Tensor, want: Tensor) -> None:
    """One value in a hundred may lie one step off: sums are added in another order."""
    assert got.dtype == want.dtype
    step = torch.finfo(want.dtype).eps
    assert torch.allclose(
        got.float(), want.float(), rtol=(8 if want.dtype == torch.float32 else 1) * step, atol=1e-6
    )
    if want.dtype != torch.float32:
        assert (got != want).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (7, 576), (5, 64), (2, 3072)])
def test_add_rms_norm(kernels: dict[str, ModuleType], rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    hidden, delta = torch.randn(2, rows, width).to(dtype)
    weight = torch.rand(width).to(dtype) + 0.5
    for added in (delta, None):
        got = kernels["add_rms_norm"].add_rms_norm(hidden, added, weight, 1e-5)
        want = norm_reference.add_rms_norm(hidden, added, weight, 1e-5)
        assert torch.equal(got[0], want[0])
        assert_rounded_alike(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1536), (3, 2500), (4, 40)])
def test_gated_silu(kernels: dict[str, ModuleType], rows: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    gate_up = (torch.randn(rows, 2 * width) * 4).to(dtype)
    gate_up[0, 0] = -200  # where the exponential overflows
    assert_rounded_alike(kernels["gated_silu"].gated_silu(gate_up), silu_reference.gated_silu(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotates", "norms"),
    [
        (4, 2, 64, True, False),
        (9, 3, 64, True, True),
        (3, 1, 80, True, True),
        (2, 2, 96, False, True),
        (16, 8, 128, False, False),
        (1, 1, 256, True, True),
    ],
)
def test_rotary_kv(
    kernels: dict[str, ModuleType],
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotates: bool,
    norms: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(head_dim)
    tokens = 3
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    cos, sin = torch.randn(2, 50, head_dim) if rotates else (None, None)
    q_norm, k_norm = torch.rand(2, head_dim).to(dtype) + 0.5 if norms else (None, None)
    positions, slots = torch.tensor([0, 49, 7]), torch.tensor([16, 63, 5])

    def run(rotary_kv: object) -> tuple[Tensor, Tensor, Tensor]:
        assert callable(rotary_kv)
        keys, values = torch.zeros(2, 4, kv_heads, 16, head_dim, dtype=dtype)
        q = rotary_kv(qkv, cos, sin, positions, slots, q_norm, k_norm, 1e-5, keys, values)
        return q, keys, values

    got, want = run(kernels["rotary_kv"].rotary_kv), run(rotary_reference.rotary_kv)
    assert got[0].is_contiguous()
    for ours, theirs in zip(got, want, strict=True):
        assert_rounded_alike(ours, theirs)
    assert torch.equal(got[2], want[2]), "values are only moved"
