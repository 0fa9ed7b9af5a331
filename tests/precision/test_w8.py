"""Which rows of int8's and fp8's layers go to our own 8-bit kernel, and what a layer says of it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.kernels.w8_linear import Codes, Shape, refusal
from service.kernels.w8_linear.plan import TABLES, WIDE, Settings
from service.precision import load_backend, w8
from service.precision.base import LinearGroup, QuantLinear
from service.precision.fp8 import FP8Linear
from service.precision.linear import LinearSpec

IN, OUTS = 208, (96, 48)
HALF = torch.float16  # which no native kernel takes
CODES: tuple[Codes, ...] = ("int8", "fp8")


def group(biased: bool = False) -> LinearGroup:
    parts = tuple(LinearSpec(f"part{i}", IN, out, bias=biased and i > 0) for i, out in enumerate(OUTS))
    return LinearGroup("qkv_proj", parts, torch.device("cpu"), HALF)


def shape_of(codes: Codes, in_features: int = 1024) -> Shape:
    """Of outputs that both tables serve."""
    return Shape(codes, WIDE, in_features, HALF)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """An H100 that is only said to be here -> what its kernel is asked for."""
    pytest.importorskip("triton")
    from service.kernels.w8_linear import cuda
    from tests.kernels.absent_gpu import recorded, tensors_on_it

    asked: list[tuple[Any, ...]] = []

    def multiply(self: Any, codes: Tensor, scales: Tensor, x16: Tensor | None) -> Tensor:
        asked.append((len(codes), codes.dtype))
        return codes.new_zeros(len(codes), self.shape.out_features, dtype=self.shape.dtype)

    monkeypatch.setattr(cuda, "multiprocessors", lambda: 13)
    monkeypatch.setattr(cuda.Bound, "multiply", multiply)
    with recorded(), tensors_on_it():
        yield asked


def built(precision: str, biased: bool = False) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"part{i}.{name}": torch.randn(*size, generator=generator).half()
        for i, out in enumerate(OUTS)
        for name, size in (("weight", (out, IN)), ("bias", (out,)))
    }
    return load_backend(precision).build(group(biased), tensors.__getitem__)


@pytest.fixture
def h100(gpu: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Tiles serve from 17 rows on; fewer are another kernel's, as are more."""
    tiles = Settings(64, 1, 8, cuts=True)
    monkeypatch.setitem(TABLES, "fp8", ((16, (None,) * 3), (64, (tiles,) * 3)))
    monkeypatch.setattr("service.precision.fp8.serves", lambda group, shape: not refusal(shape))
    return gpu


def test_few_rows_of_fp8_are_tiles_where_the_table_has_them(
    h100: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever precedes them: nothing, the norm, the gate."""
    from service.kernels.fp8_linear import triton

    launched: list[str] = []
    monkeypatch.setattr(triton, "launch", lambda kernel, *_, **named: launched.append(kernel.__name__))
    layer = built("fp8")
    assert layer.kernel == "triton.fp8_linear up to 16 rows, cuda.w8_tile up to 64 rows, torch.scaled_mm"
    assert (layer.kernel_rows, layer.makes_rows) == ((4, 16, 32, 64), "triton.fp8_rows")
    assert not layer.row_invariant
    assert sum(layer.bytes().values()) == sum(buffer.nbytes for buffer in layer.buffers()), "one weight"
    for num_rows in (16, 17, 64):
        x, gate_up = torch.zeros(num_rows, IN).half(), torch.zeros(num_rows, 2 * IN).half()
        found = [layer(x), layer.gated(gate_up), layer.normed(x, None, x[0], 1e-5)[1]]
        assert [len(y) for y in found] == [num_rows] * 3
    assert h100 == [(rows, torch.float8_e4m3fn) for rows in (17, 17, 17, 64, 64, 64)]
    assert sorted(launched) == ["few_rows_kernel"] * 3 + ["quantize_kernel"] * 9


def test_a_bias_is_triton_s_affair(h100: list[tuple[Any, ...]]) -> None:
    layer = built("fp8", biased=True)
    assert layer.kernel == "triton.fp8_linear up to 64 rows, torch.scaled_mm"
    assert layer(torch.zeros(64, IN).half()).shape == (64, sum(OUTS))
    assert not h100


def test_elsewhere_they_are_triton_s(gpu: list[tuple[Any, ...]]) -> None:
    layer = built("fp8")
    assert layer.kernel == "triton.fp8_linear up to 64 rows, torch.scaled_mm"
    assert layer.kernel_rows == (4, 16, 32, 64)
    assert layer(torch.zeros(64, IN).half()).shape == (64, sum(OUTS))
    assert not gpu


def test_on_a_cpu_there_are_none() -> None:
    layer = built("fp8")
    assert isinstance(layer, FP8Linear)
    assert (layer.kernel, layer.kernel_rows, layer.makes_rows, layer.few) == (
        "torch.fp8_linear",
        (),
        "",
        None,
    )


@pytest.mark.parametrize("codes", CODES)
def test_the_log_says_once_why_a_layer_is_not_served(
    codes: Codes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(w8.w8_linear, "absence", lambda: "")
    w8.tell_refusal.cache_clear()
    on_gpu = replace(group(), device=torch.device("cuda"))
    with caplog.at_level(logging.INFO, w8.logger.name):
        for _ in range(2):
            assert not w8.serves(on_gpu, shape_of(codes, 1000))
        assert w8.serves(on_gpu, shape_of(codes))
        assert not w8.serves(replace(on_gpu, deterministic=True), shape_of(codes))
        assert not w8.serves(group(), shape_of(codes))
        monkeypatch.setattr(w8.w8_linear, "absence", lambda: "another GPU")
        assert not w8.serves(on_gpu, shape_of(codes))
    told = [record.getMessage() for record in caplog.records]
    which = "many" if codes == "int8" else "few"
    assert all(text.startswith(f"{which} rows of `qkv_proj`") for text in told)
    reasons = [text.rpartition(": ")[2] for text in told]
    assert ["no multiple" in reasons[0], "deterministic" in reasons[1], reasons[2]] == [
        True,
        True,
        "another GPU",
    ]
