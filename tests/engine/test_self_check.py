"""A kernel that is wrong is seen before anybody is served, in any precision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_checkpoint
from torch import Tensor

from service.engine.self_check import check, check_linears, check_weights
from service.engine.startup import start
from service.errors import DeviceError
from service.messages import EngineConfig
from service.model.checkpoint import Checkpoint
from service.model.instance import ModelInstance
from service.precision import load_backend
from service.precision.base import LinearGroup, QuantLinear
from service.precision.full import FullLinear
from service.precision.linear import LinearSpec

CPU = torch.device("cpu")
PRECISIONS = ["fp32", "bf16", "int8", "int8:outliers=batch", "int8:skip=o_proj", "nf4", "fp8", "int3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    make_checkpoint(folder, "qwen2", torch.bfloat16, intermediate_size=128)
    return folder


@pytest.mark.parametrize("precision", PRECISIONS)
def test_whoever_is_wrong_is_named(folder: Path, precision: str) -> None:
    """Right as built; wrong in one class of layers, behind some numbers of rows alone."""
    model = ModelInstance.load(folder, load_backend(precision), CPU)
    check_linears(model)
    linear = model.layers()[0].down_proj
    right = linear.forward
    for layer in model.layers():
        layer.down_proj.forward = lambda x: right(x).roll(1, 1) if len(x) == 16 else right(x)  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="at 16 rows") as error:
        check_linears(model)
    assert linear.kernel in error.value.message
    assert "down_proj" in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_that_are_not_their_source_s_are_named(folder: Path, precision: str) -> None:
    """A kernel would multiply with them as it should."""
    model, source = ModelInstance.load(folder, load_backend(precision), CPU), Checkpoint(folder)
    check_weights(model, source)
    for layer in model.layers():
        right = layer.down_proj.dense
        layer.down_proj.dense = lambda part, right=right: right(part).roll(1, 0)  # type: ignore[misc, method-assign]
    with pytest.raises(DeviceError, match=r"down_proj.* off their 16-bit source") as error:
        check_weights(model, source)
    assert error.value.hint


@pytest.mark.parametrize("scale", [0.9, float("nan")])
def test_a_scale_or_nan_is_seen(scale: float) -> None:
    linear = layer(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    check(linear, 0.02)
    right = linear.forward
    linear.forward = lambda x: right(x) * scale  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="at 1 rows"):
        check(linear, 0.02)


def test_weights_of_zeros_are_right() -> None:
    linear = layer(torch.zeros(32, 64))
    check(linear, 0.02)
    linear.forward = lambda x: x[:, :32]  # type: ignore[method-assign]
    with pytest.raises(DeviceError):
        check(linear, 0.02)


def test_a_start_ends_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(self: FullLinear, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.group.out_features)

    monkeypatch.setattr(FullLinear, "forward", shifted)
    with pytest.raises(DeviceError, match="% off at 1 rows"):
        start(EngineConfig(model_path=str(folder), device="cpu", precision="bf16"), lambda _: None, 0.0)


def layer(weight: Tensor) -> FullLinear:
    group = LinearGroup("o_proj", (LinearSpec("part", weight.shape[1], weight.shape[0]),), CPU, torch.float32)
    return FullLinear(group, weight, None)


def test_a_norm_or_gate_of_a_layer_s_own_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """int8's kernels on a GPU compute them too, rounding codes of what they make."""
    model = ModelInstance.load(folder, load_backend("int8"), CPU, torch.float16)
    assert model.layers()[0].qkv_proj.makes_rows
    check_linears(model)
    for name in ("normed", "gated"):
        of_base = getattr(QuantLinear, name)

        def wrong(linear: QuantLinear, x: torch.Tensor, *more: Any, of_base: Any = of_base) -> Any:
            return of_base(linear, torch.roll(x, 1, 1), *more)

        with monkeypatch.context() as patch:
            patch.setattr(QuantLinear, name, wrong)
            with pytest.raises(DeviceError, match="what comes before"):
                check_linears(model)
