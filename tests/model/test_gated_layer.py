"""A layer whose gate_up_proj computes the gate too, for the numbers of rows for which a kernel does both."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.engine.self_check import check_linears
from service.errors import DeviceError
from service.kernels.gated_linear import NAME
from service.kernels.gated_linear.reference import gated_linear
from service.model.instance import ModelInstance
from service.precision import load_backend
from service.precision.full import FullLinear
from tests.tiny_models import load_instance, logits_of, make_checkpoint, one_sequence

SERVED = frozenset(range(6, 10))


class Gating:
    """Stands in for a weight bound to the kernel."""

    served, checked = SERVED, (6, 9)

    def __init__(self, weight: Tensor, factor: float = 1) -> None:
        self.weight, self.factor = weight, factor
        self.calls: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return gated_linear(x, self.weight) * self.factor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, "llama")
    return folder


@pytest.fixture
def instance(folder: Path) -> ModelInstance:
    return load_instance(folder)


def gate(instance: ModelInstance, factor: float = 1) -> list[Gating]:
    found = []
    for layer in instance.layers():
        linear = layer.gate_up_proj
        assert isinstance(linear, FullLinear)
        dense = torch.cat([linear.dense(part) for part in range(2)])
        linear.gating = Gating(dense, factor)  # type: ignore[assignment]
        linear.gated_rows = Gating.checked
        found.append(linear.gating)
    return found  # type: ignore[return-value]


def test_logits_are_what_they_were(instance: ModelInstance) -> None:
    """At the numbers of rows that the kernel serves; at others nobody asks it."""
    tokens = [5, 9, 2, 7, 7, 1, 3, 8, 4, 6, 2, 11]
    before = {num: logits_of(instance, tokens[:num]) for num in (5, 6, 9, 12)}
    gatings = gate(instance)
    for num, want in before.items():
        for gating in gatings:
            gating.calls.clear()
        torch.testing.assert_close(logits_of(instance, tokens[:num]), want, atol=1e-5, rtol=0)
        assert gatings[0].calls == ([num] if num in SERVED else [])


def test_while_inputs_are_observed_nobody_computes_both(instance: ModelInstance) -> None:
    """A calibration is shown what goes into down_proj, which is the gate's."""
    (first, *_), kv = gate(instance), instance.new_kv(2)
    seen: list[str] = []
    batch = one_sequence([1, 2, 3, 4, 5, 6, 7], 0, kv)
    instance.forward(batch, kv, lambda path, x: seen.append(path))
    assert not first.calls
    assert any(path.endswith("down_proj") for path in seen)


def test_a_wrong_gate_is_named_before_anybody_is_served(instance: ModelInstance) -> None:
    (first, *_) = gate(instance)
    check_linears(instance)
    assert first.calls == [6, 9]
    gate(instance, factor=1.1)
    with pytest.raises(DeviceError, match=r"the gate behind `model.layers.0.mlp.gate_proj` wrongly") as error:
        check_linears(instance)
    assert error.value.hint


def test_kernels_are_named(instance: ModelInstance) -> None:
    gated = instance.kernels()["gated_silu"]
    gate(instance)
    assert instance.kernels()["gated_silu"] == f"{NAME}, {gated}"


def test_other_layers_have_no_such_kernel(folder: Path) -> None:
    """Nor has any on a CPU."""
    for precision in ("fp32", "int8"):
        model = ModelInstance.load(folder, load_backend(precision), torch.device("cpu"))
        for layer in model.layers():
            x = torch.zeros(8, layer.gate_up_proj.group.in_features, dtype=model.dtype)
            assert layer.gate_up_proj.normed_gated(x, None, layer.input_norm, 1e-5) is None
            assert not layer.gate_up_proj.gated_rows
