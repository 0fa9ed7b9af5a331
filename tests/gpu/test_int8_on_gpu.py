"""LLM.int8() by row on a GPU, through torch: captured, alone and in company, and against the CPU's sums."""

import pytest
import torch
from torch import Tensor

from service.kernels.int8_linear import reference

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
OUT, IN = 384, 1024


def weight() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-127, 128, (OUT, IN), generator=generator, dtype=torch.int8)
    return codes, torch.rand(OUT, generator=generator) * 0.1


def rows_with_outliers(rows: int) -> Tensor:
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(rows)).half()
    x[::2, 5] *= 40
    x[-1, 17:21] = torch.tensor([900, 6.3, -41.7, 12.1])
    return x


@pytest.mark.parametrize("rows", [1, 5, 11, 16, 64, 257, 1025])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_a_captured_product_is_the_cpu_s(rows: int, dtype: torch.dtype, threshold: float) -> None:
    """Integer sums are equal; a tie may round another way on the two devices."""
    codes, scales = weight()
    x = rows_with_outliers(rows).to(dtype)
    want = reference.linear(x, codes, scales, None, threshold)
    on_gpu = x.to(CUDA), codes.to(CUDA), scales.to(CUDA)
    eager = reference.linear(*on_gpu, None, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = reference.linear(*on_gpu, None, threshold)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, eager)
    error = (eager.cpu().float() - want.float()).norm() / want.float().norm()
    assert error < 2e-3


def test_a_row_is_the_same_in_any_company() -> None:
    codes, scales = (tensor.to(CUDA) for tensor in weight())
    x = rows_with_outliers(97).to(CUDA)
    together = reference.linear(x, codes, scales, None, 6.0)
    for row in (0, 1, 50, 96):
        alone = reference.linear(x[row : row + 1], codes, scales, None, 6.0)
        assert torch.equal(alone[0], together[row])
