"""E4M3 linears on an H100: codes of the definition, sums as exact as torch's, captured, twice the same.

Few rows by Triton's kernel alone, and as the tables share them between it and w8_tile.
`pytest -m gpu tests/gpu/test_fp8_on_gpu.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from service.engine.self_check import check, check_made
from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.fp8_linear import fp8_linear, gated_linear, normed_linear, reference
from service.kernels.gated_silu import gated_silu
from service.kernels.w8_linear import FewRows, Shape, absence, bind_fp8, plan, refusal
from service.kernels.w8_linear.cuda import workspace_on
from service.precision import load_backend
from service.precision.base import LinearGroup
from service.precision.fp8 import kernels_of
from service.precision.linear import LinearSpec

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16
# (out, in): Llama-3.1-8B's four, the demo model's narrowest, ragged edges that are multiples of 16, one of
# them for each column of the table: narrow, deep, wide
REAL = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
RAGGED = [(576, 1536), (80, 208), (1008, 784), (16, 48), (112, 8208), (16400, 272)]


@pytest.fixture(params=["triton", "as served"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Of few rows."""
    if request.param != "triton" and (reason := absence()):
        pytest.skip(reason)
    return str(request.param)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialized is full of NaN, as is what blocks leave for each other."""
    if not absence():
        workspace_on(CUDA, "fp8").sums.fill_(float("nan"))
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rows_of(num_rows: int, width: int) -> Tensor:
    x = torch.randn(num_rows, width, device=CUDA) * 2
    x[:, 5] *= 30
    return x.bfloat16()


def weight_of(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(torch.randn(out_features, in_features, device=CUDA) * 0.05)


def few_of(kernel: str, codes: Tensor, scales: Tensor, bias: Tensor | None = None) -> FewRows | None:
    out_features, in_features = codes.shape
    shape = Shape("fp8", out_features, in_features, BF16, bias is not None)
    return None if kernel == "triton" or refusal(shape) else bind_fp8(codes, scales, shape)


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("width", [16, 784, 4096, 14336])
def test_codes_are_the_definition_s(width: int) -> None:
    """On this device and on a CPU, bit for bit."""
    from service.kernels.fp8_linear.triton import quantize_rows

    for num_rows in (1, 16, 64, 65, 1024):
        x = rows_of(num_rows, width)
        x[-1] = 0
        codes, scales = quantize_rows(x)
        for given in (x, x.cpu()):
            want, want_scales = reference.quantize_rows(given)
            assert torch.equal(codes.view(torch.uint8).cpu(), want.view(torch.uint8).cpu())
            assert torch.equal(scales.cpu(), want_scales.cpu())


@pytest.mark.parametrize(("out_features", "in_features"), REAL + RAGGED)
def test_sums(kernel: str, out_features: int, in_features: int) -> None:
    """float64 of the codes, rounded to bfloat16: up to 64 rows are our own, the others torch's."""
    torch.manual_seed(out_features + in_features)
    codes, scales = weight_of(out_features, in_features)
    weight = codes.double() * scales.double()[:, None]
    bias = torch.randn(out_features, device=CUDA).bfloat16()
    is_real = (out_features, in_features) in REAL
    numbers = (1, 3, 8, 16, 17, 32, 33, 48, 64, 65, 257) if is_real else (*range(1, 66), 257)
    for added in (None, bias):
        few = few_of(kernel, codes, scales, added)
        for num_rows in numbers:
            x = rows_of(num_rows, in_features)
            rows, row_scales = reference.quantize_rows(x)
            want = (rows.double() * row_scales.double()[:, None]) @ weight.t()
            want = want if added is None else want + added.double()
            with poisoned():
                got = fp8_linear(x, codes, scales, added, few)
            assert got.dtype == BF16
            rounded = relative_rms(want.bfloat16(), want)
            ours = 1.1 if want.numel() >= 1000 else 1.5  # of a few numbers the rounding itself varies
            most = rounded * (ours if num_rows <= 64 else 3)
            assert relative_rms(got, want) < most, (num_rows, added is None)
            assert torch.equal(got, fp8_linear(x, codes, scales, added, few)), "run to run"
    if kernel != "triton":
        assert not workspace_on(CUDA, "fp8").arrived.any(), "the next launch counts from zero"


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_broken_row_spares_the_others(kernel: str, broken: float) -> None:
    codes, scales = weight_of(28672, 4096)
    few = few_of(kernel, codes, scales)
    for num_rows in (3, 16, 64):
        x = rows_of(num_rows, 4096)
        want = fp8_linear(x, codes, scales, None, few)
        x[1, 9] = broken
        y = fp8_linear(x, codes, scales, None, few)
        assert not torch.isfinite(y[1]).any()
        assert torch.equal(y[2:], want[2:])
        assert torch.equal(y[0], want[0])


@pytest.mark.parametrize("num_rows", [1, 16, 48, 65, 1024])
def test_what_precedes_a_linear_is_made_with_its_codes(kernel: str, num_rows: int) -> None:
    codes, scales = weight_of(4096, 14336)
    few = few_of(kernel, codes, scales)
    gate_up = rows_of(num_rows, 28672)
    want = fp8_linear(gated_silu(gate_up), codes, scales, None, few)
    assert relative_rms(gated_linear(gate_up, codes, scales, None, few), want.double()) < 4e-3
    codes, scales = weight_of(28672, 4096)
    few = few_of(kernel, codes, scales)
    hidden, delta, gain = rows_of(num_rows, 4096), rows_of(num_rows, 4096), rows_of(1, 4096)[0]
    for given in (delta, None):
        want_total, x = add_rms_norm(hidden, given, gain, 1e-5)
        total, y = normed_linear(hidden, given, gain, 1e-5, codes, scales, None, few)
        assert torch.equal(total, want_total)
        assert relative_rms(y, fp8_linear(x, codes, scales, None, few).double()) < 4e-3


@pytest.mark.parametrize("num_rows", [1, 8, 16, 33, 64])
def test_captured(kernel: str, num_rows: int) -> None:
    """A layer's norm, gate_up, gate and down, launched dependently; replayed on other rows."""
    wide, narrow = weight_of(28672, 4096), weight_of(4096, 14336)
    of_wide, of_narrow = few_of(kernel, *wide), few_of(kernel, *narrow)
    gain = rows_of(1, 4096)[0] / 8
    x = rows_of(num_rows, 4096)

    def both() -> Tensor:
        hidden, gate_up = normed_linear(x, x, gain, 1e-5, *wide, None, of_wide)
        return hidden + gated_linear(gate_up, *narrow, None, of_narrow)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(5):
        x.copy_(rows_of(num_rows, 4096))
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, both())


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_nothing_asks_the_device(kernel: str) -> None:
    codes, scales = weight_of(28672, 4096)
    few = few_of(kernel, codes, scales)
    x = rows_of(16, 4096)
    fp8_linear(x, codes, scales, None, few)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fp8_linear(x, codes, scales, None, few)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("out_features", "biased"), [(576, False), (576, True), (16400, False)])
def test_a_layer_of_the_backend(out_features: int, biased: bool) -> None:
    """Its own check passes at every number of rows, and `/version` names who serves."""
    spec = LinearSpec("down", 1536, out_features, bias=biased)
    group = LinearGroup("down_proj", (spec,), CUDA, BF16)
    weights = {"down.weight": torch.randn(out_features, 1536) / 40, "down.bias": torch.randn(out_features)}
    layer = load_backend("fp8").build(group, weights.__getitem__)
    shape = Shape("fp8", out_features, 1536, BF16, biased)
    assert layer.kernel == kernels_of(() if absence() or refusal(shape) else plan(shape))[0]
    assert {16, 32, 64} <= set(layer.kernel_rows)
    with torch.inference_mode():
        check(layer, 0.08)
        check_made(layer, 0.08)
