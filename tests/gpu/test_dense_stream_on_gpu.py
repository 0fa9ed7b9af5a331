"""16-bit linears of few rows on an H100 by our own kernel: right, each time alike, also captured in chains.

The measure is cuBLAS against float64. Variants are those of the table, here for all
shapes. `pytest -m gpu tests/gpu/test_dense_stream_on_gpu.py`, by hand.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.cuda import absence
from service.kernels.dense_linear import bind_linear, cuda, few_rows, linear_kernel, plan

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = (torch.float16, torch.bfloat16)
ROWS = (1, 3, 8, 9, 16, 17, 32, 33, 64)
# Llama-3.1-8B's, its head, and sizes that fill no tile
LINEARS = [
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (5000, 2176),
    (3080, 6464),
]
WORSE_THAN_CUBLAS = 2.0


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    if reason := absence():
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "TABLE", tuple(entry._replace(least_outputs=0) for entry in few_rows.TABLE))
        variants = {row.variant for dtype in DTYPES for row in plan(*LINEARS[0], dtype)}
        with ThreadPoolExecutor() as pool:
            list(pool.map(cuda.load, variants))
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def linear(out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = (torch.randn(out, width, device=CUDA) / width**0.5).to(dtype)
    return weight, torch.randn(out, device=CUDA).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), LINEARS)
def test_it_is_as_right_as_cublas(out: int, width: int, dtype: torch.dtype) -> None:
    weight, bias = linear(out, width, dtype)
    assert linear_kernel(weight) == "cuda.dense_stream up to 64 rows, torch.linear"
    multiply, wide = bind_linear(weight, bias), weight.double()
    assert multiply is not None
    torch.use_deterministic_algorithms(True)  # memory that torch hands out uninitialized is full of NaN
    try:
        for num_rows in ROWS:
            x = torch.randn(num_rows, width, device=CUDA).to(dtype)
            got, again = multiply(x), multiply(x)
            assert torch.equal(got, again), "run to run"
            want = x.double() @ wide.t() + bias.double()
            assert error(got, want) <= WORSE_THAN_CUBLAS * error(F.linear(x, weight, bias), want)
    finally:
        torch.use_deterministic_algorithms(False)


def test_more_rows_are_torch_s() -> None:
    weight, bias = linear(4096, 4096, torch.float16)
    multiply = bind_linear(weight, bias)
    assert multiply is not None
    x = torch.randn(65, 4096, device=CUDA).half()
    assert torch.equal(multiply(x), F.linear(x, weight, bias))
    assert multiply(x[:0]).shape == (0, 4096)


@pytest.mark.parametrize("num_rows", [1, 16, 64])
def test_a_captured_chain_equals_the_eager_one(num_rows: int) -> None:
    """Each launch placed while the one before it works, on its output: a hundred times the same bits."""
    shapes = [(4096, 4096), (14336, 4096), (4096, 14336), (5000, 4096), (4096, 5000 // 64 * 64)]
    weights = [linear(out, width, torch.float16)[0] for out, width in shapes]
    layers = [bind_linear(weight) for weight in weights]

    def chain(x: Tensor) -> list[Tensor]:
        told = []
        for layer, (_, width) in zip(layers, shapes, strict=True):
            assert layer is not None
            x = layer(x[:, :width])
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


def test_deterministic_layers_are_not_bound_to_it() -> None:
    weight, _ = linear(4096, 4096, torch.float16)
    assert linear_kernel(weight, deterministic=True) == "triton.fixed_linear"
    assert not isinstance(bind_linear(weight, deterministic=True), cuda.Bound)
