"""The streaming linear for few rows in Triton's interpreter against torch."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import relative_rms

RELATIVE_RMS = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


@pytest.fixture(scope="module")
def stream() -> Iterator[ModuleType]:
    with interpreted("service.kernels.dense_linear.triton") as module:
        yield module


@pytest.mark.parametrize("dtype", RELATIVE_RMS)
@pytest.mark.parametrize(("rows", "splits"), [(1, 1), (3, 2), (16, 4), (33, 2)])
def test_agrees_with_torch(stream: ModuleType, rows: int, splits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    x, weight, bias = (
        torch.randn(rows, 1024).to(dtype),
        torch.randn(192, 1024).to(dtype),
        torch.randn(192).to(dtype),
    )
    for added in (bias, None):
        got = stream.stream_linear(x, weight, added, splits)
        want = F.linear(x.float(), weight.float(), None if added is None else added.float())
        assert got.dtype == dtype
        assert relative_rms(got, want) < RELATIVE_RMS[dtype]
    assert not stream.arrivals(x.device).any(), "the next launch counts from zero"


def test_rows_do_not_depend_on_their_number(stream: ModuleType) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 512).half(), torch.randn(64, 512).half()
    together = stream.stream_linear(x, weight, None, 2)
    for row in (0, 15):
        assert torch.equal(stream.stream_linear(x[row : row + 1], weight, None, 2)[0], together[row])


def test_what_it_serves(stream: ModuleType) -> None:
    def weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.empty(out_features, in_features, dtype=dtype, device="meta")

    assert stream.most_rows(weight(4096, 4096)) == 16
    assert stream.most_rows(weight(128256, 4096, torch.bfloat16)) == 16
    assert stream.most_rows(weight(4096, 14336)) == 64, "long sums"
    assert stream.most_rows(weight(6144, 4096, torch.float32)) == 0
    assert stream.most_rows(weight(960, 576)) == 0, "small"
    assert stream.most_rows(weight(6150, 4096)) == 0, "a ragged tile"
    assert stream.most_rows(weight(6144, 4160)) == 0, "a ragged tile"
    shapes = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096), (256, 4096))
    assert [stream.splits_of(*shape) for shape in shapes] == [2, 2, 1, 2, 1]
