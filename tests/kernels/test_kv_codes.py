"""8-bit codes of K and V: what they may lose, and that Triton writes the bits of the definition."""

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from service.kernels.kv_codes import LARGEST, LEAST_SCALE, dequantized, quantized
from service.kernels.kv_codes.triton import FP8_HALVES, INT8_HALVES
from service.kernels.rotary_kv import coded, rotary_kv, rotary_kv_kernel
from tests.kernels import ptx
from tests.kernels.interpreter import interpreted

CODES = pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.rotary_kv.triton") as module:
        yield module


def test_hand_computed() -> None:
    """254 / 127 = 2 and 448 / 448 = 1, exact in bfloat16; halves go to even."""
    x = torch.tensor([[254.0, -254.0, 3.0, 5.0, 1.0, -2.9, 0.0, 100.0]])
    codes, scales = quantized(x, torch.int8)
    assert scales.tolist() == [2.0]
    assert codes.tolist() == [[127, -127, 2, 2, 0, -1, 0, 50]]
    x = torch.tensor([[448.0, -300.0, 17.0, 19.0, 2.0**-10, 0.0]])
    codes, scales = quantized(x, torch.float8_e4m3fn)
    assert scales.tolist() == [1.0]
    # 17 lies between 16 and 18 and goes to the even mantissa, 2^-10 is half of the least code
    assert codes.float().tolist() == [[448.0, -288.0, 16.0, 20.0, 0.0, 0.0]]


@CODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_half_a_step(codes: torch.dtype, dtype: torch.dtype) -> None:
    """Of vectors of all sizes that the type has."""
    torch.manual_seed(0)
    sizes = 10.0 ** torch.linspace(-4, 4, 200)[:, None]
    x = (torch.randn(200, 64) * sizes).to(dtype)
    found, scales = quantized(x, codes)
    assert found.dtype == codes
    assert scales.dtype == torch.bfloat16
    steps = scales.float()[:, None]
    if codes == torch.int8:
        bound = 0.5 * steps
        assert int(found.abs().max()) == 127
    else:  # three bits of mantissa, down to 2^-9 of a scale
        bound = torch.maximum(x.float().abs() / 16, steps * 2**-10)
    # what is largest may lie a quarter of a step beyond, since its scale is rounded
    bound = bound * 1.0001 + (x.float().abs() - LARGEST[codes] * steps).clamp(min=0)
    assert bool(((dequantized(found, scales) - x.float()).abs() <= bound).all())
    assert bool((x.float().abs().amax(-1) <= scales.float() * LARGEST[codes] * (1 + 2**-8)).all())


@CODES
def test_what_codes_mean_is_rounded_once(codes: torch.dtype) -> None:
    """For every code under many scales."""
    every = torch.arange(256, dtype=torch.uint8).view(codes).expand(500, 256)
    scales = (torch.rand(500) * 10.0 ** torch.linspace(-5, 3, 500)).to(torch.bfloat16)
    exact = every.double() * scales.double()[:, None]
    assert torch.equal(dequantized(every, scales).double().nan_to_num(), exact.nan_to_num())
    for dtype in (torch.bfloat16, torch.float16):
        rounded = dequantized(every, scales, dtype)
        assert rounded.dtype == dtype
        assert torch.equal(rounded.nan_to_num(), exact.to(dtype).nan_to_num())


@CODES
def test_zero_tiny_and_broken_values(codes: torch.dtype) -> None:
    """Codes are finite whatever comes; only a scale may be broken, and then it breaks what is read."""
    x = torch.ones(5, 8)
    x[0] = 0.0
    x[1] = 1e-30
    x[2, 3] = float("nan")
    x[3, 3] = float("-inf")
    found, scales = quantized(x, codes)
    assert bool(found.float().isfinite().all())
    assert scales[:2].tolist() == [LEAST_SCALE, LEAST_SCALE]
    read = dequantized(found, scales)
    assert torch.equal(read[:2], torch.zeros(2, 8))
    assert bool(read[2:4].isnan().all())
    assert torch.allclose(read[4], torch.ones(8), rtol=2**-7)


@CODES
def test_assembly_reads_every_code(codes: torch.dtype) -> None:
    """What the attention kernels' inline PTX makes of a register, for all 256 codes in all four places."""
    every = torch.arange(256, dtype=torch.uint8)
    words = torch.stack((every, every.flip(0), every.roll(7), every.roll(100)), 1)
    asm = (INT8_HALVES if codes == torch.int8 else FP8_HALVES).value
    even, odd = ptx.run(asm, "=r,=r,r", [words.view(torch.int16).numpy()])
    values = words.view(codes).float().view(256, 2, 2)
    for got, want in ((even, values[..., 0]), (odd, values[..., 1])):
        np.testing.assert_array_equal(got.view(np.float16).reshape(256, 2), want.numpy())


class Pages:
    """An empty coded cache of four blocks."""

    def __init__(self, kv_heads: int, head_dim: int, codes: torch.dtype) -> None:
        self.keys, self.values = torch.zeros(2, 4, kv_heads, 16, head_dim).to(codes)
        self.scales = torch.zeros(4, kv_heads, 16, 2, dtype=torch.bfloat16)

    def read(self) -> Tensor:
        return torch.stack(
            (dequantized(self.keys, self.scales[..., 0]), dequantized(self.values, self.scales[..., 1]))
        )


@CODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotates", "norms"),
    [(4, 2, 64, True, False), (3, 1, 80, False, False), (9, 3, 64, True, True), (2, 2, 96, False, True)],
)
def test_triton_writes_what_the_definition_does(
    kernels: ModuleType,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotates: bool,
    norms: bool,
    dtype: torch.dtype,
    codes: torch.dtype,
) -> None:
    torch.manual_seed(head_dim)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * head_dim).to(dtype)
    cos, sin = torch.randn(2, 50, head_dim) if rotates else (None, None)
    q_norm, k_norm = torch.rand(2, head_dim).to(dtype) + 0.5 if norms else (None, None)
    positions, slots = torch.tensor([0, 49, 7]), torch.tensor([16, 63, 5])
    arguments = (qkv, cos, sin, positions, slots, q_norm, k_norm, 1e-5)
    ours, theirs = Pages(kv_heads, head_dim, codes), Pages(kv_heads, head_dim, codes)
    q = kernels.rotary_kv(*arguments, ours.keys, ours.values, ours.scales)
    want = coded.rotary_kv(*arguments, theirs.keys, theirs.values, theirs.scales)
    torch.testing.assert_close(q, want, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
    if not rotates and not norms:  # nothing but the code's own rounding
        assert torch.equal(ours.keys.view(torch.int8), theirs.keys.view(torch.int8))
    assert torch.equal(ours.values.view(torch.int8), theirs.values.view(torch.int8))
    assert torch.equal(ours.scales[..., 1], theirs.scales[..., 1])
    got, want = ours.read(), theirs.read()
    assert float((got - want).norm() / want.norm()) < 2e-3
    written = torch.zeros(4, 16, dtype=torch.bool)
    written[slots // 16, slots % 16] = True
    assert torch.equal(got.ne(0).any(-1).any(2), written.expand(2, 4, 16))


def meta_pages(pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
    return pages.keys.to("meta"), pages.values.to("meta"), pages.scales.to("meta")


@CODES
def test_triton_s_codes_are_finite_and_broken_values_break_the_scale(
    kernels: ModuleType, codes: torch.dtype
) -> None:
    qkv = torch.ones(1, 4 * 64)
    qkv[0, 2 * 64 + 5] = float("nan")
    qkv[0, 3 * 64 + 5] = float("inf")
    pages = Pages(1, 64, codes)
    zero = torch.zeros(1, dtype=torch.int64)
    with np.errstate(invalid="ignore"):
        kernels.rotary_kv(
            qkv, None, None, zero, zero, None, None, 1e-5, pages.keys, pages.values, pages.scales
        )
    assert bool(pages.keys.float().isfinite().all())
    assert bool(pages.values.float().isfinite().all())
    assert bool(pages.read()[:, 0, 0, 0].isnan().all())


def test_a_cpu_codes_what_its_kernel_writes() -> None:
    """The package's way, native where it serves, is the definition after a rounding to bfloat16."""
    torch.manual_seed(1)
    qkv = torch.randn(20, 4 * 64).to(torch.bfloat16)
    positions, slots = torch.arange(20), torch.randperm(64)[:20]
    cos, sin = torch.randn(2, 50, 64)
    plain = torch.zeros(2, 4, 1, 16, 64, dtype=torch.bfloat16)
    pages = Pages(1, 64, torch.int8)
    q = rotary_kv(qkv, cos, sin, positions, slots, None, None, 1e-5, *plain)
    same = rotary_kv(
        qkv, cos, sin, positions, slots, None, None, 1e-5, pages.keys, pages.values, pages.scales
    )
    assert torch.equal(q, same)
    for part, (cache, values) in enumerate(zip((pages.keys, pages.values), plain, strict=True)):
        codes, scales = quantized(values, torch.int8)
        assert torch.equal(cache, codes)
        written = values.ne(0).any(-1)
        assert torch.equal(pages.scales[..., part][written], scales[written])
    q = coded.rotary_kv(
        qkv.to("meta"), None, None, positions, slots.to("meta"), None, None, 1e-5, *meta_pages(pages)
    )
    assert q.is_meta, "on another device it never reaches the C library"
    name = rotary_kv_kernel(torch.bfloat16, torch.device("cpu"), 64, is_coded=True)
    assert name == "torch" or name.endswith(", coded by torch")
