"""Three-bit linears on a GPU: as exact as cuBLAS over the same weights, captured, twice the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.int3_linear import dequantize, int3_linear, pack

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
# (out, in, group): Llama-3.1-8B's four, the demo model's, ragged edges
SHAPES = [
    (6144, 4096, 128),
    (4096, 4096, 64),
    (28672, 4096, 128),
    (4096, 14336, 128),
    (960, 576, 64),
    (32, 64, 64),
    (1056, 832, 64),
]
ROWS = (1, 7, 16, 17, 33, 64, 257, 1024)


def layer_of(out_features: int, in_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = in_features // group
    codes = torch.randint(0, 8, (in_features, out_features), device=CUDA)
    zeros = torch.randint(0, 8, (out_features, num_groups), device=CUDA)
    scales = torch.rand(num_groups, out_features, device=CUDA) * 0.02 + 1e-3
    scales[0, :3] = torch.tensor([0.0, 6e-8, 100.0], device=CUDA)
    return pack(codes), pack(zeros), scales.half()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_as_exact_as_cublas(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of a 16-bit product of the same weights."""
    torch.manual_seed(sum(shape))
    layer = layer_of(*shape)
    weight = dequantize(*layer).double()
    for num_rows in ROWS:
        x = torch.randn(num_rows, shape[1], device=CUDA).to(dtype)
        want = x.double() @ weight
        torch.empty(num_rows * shape[0] * 8, device=CUDA).fill_(torch.nan)  # what it gets is poisoned
        got = int3_linear(x, *layer)
        usual = F.linear(x, weight.t().to(dtype))
        size = want.norm()
        assert (got.double() - want).norm() / size <= 2 * (usual.double() - want).norm() / size, num_rows
        assert torch.equal(got, int3_linear(x, *layer)), num_rows


def test_a_graph_replays_what_was_captured() -> None:
    layer = layer_of(4096, 4096, 64)
    x = torch.randn(16, 4096, device=CUDA).half()
    int3_linear(x, *layer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = int3_linear(x, *layer)
    x.copy_(torch.randn(16, 4096, device=CUDA))
    graph.replay()
    assert torch.equal(y, int3_linear(x, *layer))
