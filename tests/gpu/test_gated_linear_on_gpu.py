"""gate_up of many rows and the gate in one by our own kernel on an H100: right, each time alike, captured.

The measure is cuBLAS with gated_silu behind it, against float64.
`pytest -m gpu tests/gpu/test_gated_linear_on_gpu.py`, by hand.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.engine.self_check import check_gated
from service.kernels import gated_linear
from service.kernels.cuda import absence
from service.kernels.gated_linear import cuda, plan
from service.kernels.gated_silu import gated_silu
from service.precision.base import LinearGroup
from service.precision.full import FullLinear
from service.precision.linear import LinearSpec

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# gate and up of Llama-3.2-1B, Llama-3.1-8B and Qwen2.5-7B, and sizes that fill no tile
LINEARS = [(16384, 2048), (28672, 4096), (37888, 3584), (2 * 5000, 2184)]
ROWS = (1, 63, 128, 333, 768, 897, 1024, 2048)
EPS = 1e-5
WORSE_THAN_CUBLAS = 2.0


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    if reason := absence():
        pytest.skip(reason)
    with ThreadPoolExecutor() as pool:
        list(pool.map(cuda.load, map(plan.Variant, (0, 1))))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def weight_of(out: int, width: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(out, width, device=CUDA) / width**0.5).to(dtype)


def bound(weight: Tensor) -> cuda.Bound:
    """For any number of rows, served or not."""
    return cuda.Bound(weight, plan.Variant(int(weight.dtype is torch.bfloat16)))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", plan.DTYPES)
@pytest.mark.parametrize(("out", "width"), LINEARS)
def test_it_is_as_right_as_cublas_and_the_gate(out: int, width: int, dtype: torch.dtype) -> None:
    weight = weight_of(out, width, dtype)
    multiply, wide = bound(weight), weight.double()
    torch.use_deterministic_algorithms(True)  # memory that torch hands out uninitialized is full of NaN
    try:
        for num_rows in ROWS:
            x = torch.randn(num_rows, width, device=CUDA).to(dtype)
            got, again = multiply(x), multiply(x)
            assert torch.equal(got, again), "run to run"
            gate, up = (x.double() @ wide.t()).chunk(2, -1)
            want = F.silu(gate) * up
            assert error(got, want) <= WORSE_THAN_CUBLAS * error(gated_silu(F.linear(x, weight)), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_nothing_is_written_behind_the_last_row_and_column(dtype: torch.dtype) -> None:
    weight = weight_of(2 * 1544, 2048, dtype)
    multiply, x = bound(weight), torch.randn(333, 2048, device=CUDA).to(dtype)
    y = torch.full((400, 1544), float("nan"), device=CUDA, dtype=dtype)
    multiply.write(x, y[:333])
    assert torch.equal(y[:333], multiply(x))
    assert y[333:].isnan().all()


def test_a_row_does_not_depend_on_the_others() -> None:
    """Sums are not cut: a row has the same bits wherever it is, and however many are computed with it."""
    weight = weight_of(28672, 4096, torch.float16)
    multiply, x = bound(weight), torch.randn(2048, 4096, device=CUDA).half()
    whole = multiply(x)
    assert torch.equal(multiply(x[:1024]), whole[:1024])
    assert torch.equal(multiply(x[1000:1800]), whole[1000:1800])


@pytest.mark.parametrize("num_rows", [768, 1000, 2048])
def test_a_captured_chain_equals_the_eager_one(num_rows: int) -> None:
    """Each launch placed while the one before it works, on its output: a hundred times the same bits."""
    weights = [weight_of(28672, 4096, torch.float16), weight_of(8192, 14336, torch.float16)] * 2
    layers = [bound(weight) for weight in weights]

    def chain(x: Tensor) -> list[Tensor]:
        told = []
        for layer in layers:
            x = layer(x)
            told.append(x)
        return told

    x = torch.randn(num_rows, 4096, device=CUDA).half()
    want = chain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(x)
    for _ in range(100):
        for y in captured:
            y.fill_(float("nan"))
        graph.replay()
        for y, expected in zip(captured, want, strict=True):
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", plan.DTYPES)
def test_a_layer_is_served_by_it(dtype: torch.dtype) -> None:
    """At its numbers of rows and no others; what is summed on the way is the same."""
    parts = tuple(LinearSpec(name, 4096, 14336) for name in ("gate", "up"))
    layer = FullLinear(LinearGroup("gate_up_proj", parts, CUDA, dtype), weight_of(28672, 4096, dtype), None)
    assert layer.kernel.startswith(gated_linear.NAME)
    gain = torch.rand(4096, device=CUDA).to(dtype)
    for num_rows in (64, 512, 768, 833, 1024, 2048):
        hidden, delta = torch.randn(2, num_rows, 4096, device=CUDA).to(dtype)
        made = layer.normed_gated(hidden, delta, gain, EPS)
        assert (made is not None) == (num_rows in (768, 1024, 2048))
        if made is not None:
            total, both = layer.normed(hidden, delta, gain, EPS)
            assert torch.equal(made[0], total)
            assert error(made[1], gated_silu(both).double()) < (1e-2 if dtype is torch.bfloat16 else 1e-3)
    check_gated(layer, 0.02)
