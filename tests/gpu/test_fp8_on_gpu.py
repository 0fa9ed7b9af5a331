"""E4M3 linears on an H100: codes of the definition, sums as exact as torch's, captured, twice the same."""

import itertools

import pytest
import torch
from torch import Tensor

from service.kernels.add_rms_norm import add_rms_norm
from service.kernels.fp8_linear import fp8_linear, gated_linear, normed_linear, reference
from service.kernels.gated_silu import gated_silu

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# (out, in): Llama-3.1-8B's four, the demo model's narrowest, ragged edges that are multiples of 16
SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (576, 1536), (80, 208), (1008, 784)]


def rows_of(num_rows: int, width: int) -> Tensor:
    x = torch.randn(num_rows, width, device=CUDA) * 2
    x[:, 5] *= 30
    return x.bfloat16()


def weight_of(out_features: int, in_features: int) -> tuple[Tensor, Tensor]:
    return reference.quantize_rows(torch.randn(out_features, in_features, device=CUDA) * 0.05)


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


@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_sums(out_features: int, in_features: int) -> None:
    """float64 of the codes, rounded to bfloat16: up to 64 rows are our own, the others torch's."""
    torch.manual_seed(out_features + in_features)
    codes, scales = weight_of(out_features, in_features)
    weight = codes.double() * scales.double()[:, None]
    bias = torch.randn(out_features, device=CUDA).bfloat16()
    for num_rows, added in itertools.product((1, 3, 16, 17, 33, 64, 65, 257), (None, bias)):
        x = rows_of(num_rows, in_features)
        rows, row_scales = reference.quantize_rows(x)
        want = (rows.double() * row_scales.double()[:, None]) @ weight.t()
        want = want if added is None else want + added.double()
        torch.full((8, num_rows, out_features), float("nan"), device=CUDA)
        got = fp8_linear(x, codes, scales, added)
        rounded = relative_rms(want.bfloat16(), want)
        assert relative_rms(got, want) < (1.1 * rounded if num_rows <= 64 else 3 * rounded), num_rows
        assert torch.equal(got, fp8_linear(x, codes, scales, added)), "run to run"


@pytest.mark.parametrize("num_rows", [1, 16, 65, 1024])
def test_what_precedes_a_linear_is_made_with_its_codes(num_rows: int) -> None:
    codes, scales = weight_of(4096, 14336)
    gate_up = rows_of(num_rows, 28672)
    want = fp8_linear(gated_silu(gate_up), codes, scales, None)
    assert relative_rms(gated_linear(gate_up, codes, scales, None), want.double()) < 4e-3
    codes, scales = weight_of(6144, 4096)
    hidden, delta, gain = rows_of(num_rows, 4096), rows_of(num_rows, 4096), rows_of(1, 4096)[0]
    for given in (delta, None):
        want_total, x = add_rms_norm(hidden, given, gain, 1e-5)
        total, y = normed_linear(hidden, given, gain, 1e-5, codes, scales, None)
        assert torch.equal(total, want_total)
        assert relative_rms(y, fp8_linear(x, codes, scales, None).double()) < 4e-3


@pytest.mark.parametrize("num_rows", [1, 33, 64])
def test_captured(num_rows: int) -> None:
    codes, scales = weight_of(4096, 4096)
    x = rows_of(num_rows, 4096)
    fp8_linear(x, codes, scales, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fp8_linear(x, codes, scales, None)
    x.copy_(rows_of(num_rows, 4096))
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, fp8_linear(x, codes, scales, None))
