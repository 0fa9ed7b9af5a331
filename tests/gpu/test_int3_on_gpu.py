"""Three bits on a GPU: Triton's linear, as exact as cuBLAS over the same weights, and how they are rounded.

What serves on an H100 is in test_w4_on_gpu.py.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.int3_linear import dequantize, int3_linear, pack, pack_zeros
from service.kernels.int3_round import reference, round_groups
from tests.kernels.test_int3_round import check_as_good

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
    return pack(codes), pack_zeros(zeros), scales.half()


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


@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_are_rounded_as_on_a_cpu(dtype: torch.dtype, group_size: int) -> None:
    """Where two clippings tie to float32's last digits, either is taken; -> few groups."""
    torch.manual_seed(group_size)
    weight = torch.randn(300, 1024)
    for each in (weight * 0.02, weight.pow(3), weight - 5, (weight * 4).round(), torch.zeros_like(weight)):
        told = each.to(dtype)
        got = [part.cpu() for part in round_groups(told.cuda(), group_size)]
        want = reference.round_groups(told, group_size)
        assert check_as_good(told, (got[0], got[1], got[2]), want, group_size) < 0.02


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_scale(broken: float) -> None:
    weight = torch.randn(3, 128)
    weight[1, 70] = broken
    scales = round_groups(weight.cuda(), 64)[2]
    assert scales.isfinite().tolist() == [[True, True], [True, False], [True, True]]


def test_how_long_rounding_takes(record_property: Callable[[str, object], None]) -> None:
    """Of Llama-3.1-8B's gate_proj; all 224 linears are 119 times as many weights."""
    weight = torch.randn(14336, 4096, device=CUDA).bfloat16()
    round_groups(weight, 64)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        round_groups(weight, 64)
    end.record()
    end.synchronize()
    record_property("figure", f"58.7M weights rounded to three bits: {start.elapsed_time(end) / 5:.2f} ms")
