"""What our own W4 kernels take on an H100, beside cuBLAS: figures to be read, by hand.

`pytest -m gpu tests/gpu/test_w4_times_on_gpu.py`
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.w4_linear import absence, bind
from tests.gpu.w4_linears import AFFINE, CUDA, LINEARS, linear
from tests.kernels.w4_weights import KINDS, Codes

pytestmark = pytest.mark.gpu

LLAMA = ("qkv", "o", "gate_up", "down")
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024)


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    if reason := absence():
        pytest.skip(reason)


@pytest.mark.parametrize("num_rows", [1, 64])
def test_what_a_call_costs_the_host(num_rows: int, record_property: Callable[[str, object], None]) -> None:
    weight, shape, _ = linear(AFFINE, "small")
    multiply = bind(weight, shape)
    x = torch.randn(num_rows, shape.in_features, device=CUDA).half()
    for _ in range(3):
        multiply(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(500):
        multiply(x)
    us = (time.perf_counter() - start) * 1e6 / 500
    torch.cuda.synchronize()
    record_property("figure", f"a call of a 4-bit linear, {num_rows} rows: {us:.1f} us of the host")


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_how_long_a_layer_takes(codes: Codes, record_property: Callable[[str, object], None]) -> None:
    """Llama-3.1-8B's four linears from weights rotated past the L2, in a captured graph."""
    for num_rows in ROWS:
        times = [time_of(codes, name, num_rows) for name in LLAMA]
        told = " + ".join(f"{us:.1f}" for us in times)
        record_property("figure", f"{codes!s:10} {num_rows:5} rows: {sum(times):6.1f} us = {told}")


def test_how_long_cublas_takes_in_float16(record_property: Callable[[str, object], None]) -> None:
    for num_rows in ROWS:
        times = []
        for name in LLAMA:
            outs, in_features = LINEARS[name]
            copies = max(2, (192 << 20) // (sum(outs) * in_features * 2))
            weights = torch.randn(copies, sum(outs), in_features, device=CUDA, dtype=torch.float16)
            products = [partial(F.linear, weight=weight) for weight in weights]
            times.append(median_us(products, torch.randn(num_rows, in_features, device=CUDA).half()))
        told = " + ".join(f"{us:.1f}" for us in times)
        record_property("figure", f"cuBLAS fp16 {num_rows:4} rows: {sum(times):6.1f} us = {told}")


def time_of(codes: Codes, name: str, num_rows: int) -> float:
    weight, shape, _ = linear(codes, name)
    copies = max(2, (192 << 20) // weight.codes.nbytes)
    products: list[Callable[[Tensor], Tensor]] = [bind(weight, shape)]
    for _ in range(copies - 1):
        zeros = None if weight.zeros is None else weight.zeros.clone()
        copy = replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone(), zeros=zeros)
        products.append(bind(copy, shape))
    return median_us(products, torch.randn(num_rows, shape.in_features, device=CUDA).half())


def median_us(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Of a product, all of them captured one behind the other."""
    for multiply in products:
        multiply(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for multiply in products:
            multiply(x)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(products))
    return sorted(times)[len(times) // 2]
