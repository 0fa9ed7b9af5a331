"""The layer that awq, nf4 and int3 share on an H100: the weights of their own layers, in another order."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.engine.self_check import ROWS, check
from service.errors import DeviceError
from service.kernels.awq_linear.reference import pack
from service.precision import load_backend, parse_precision, w4
from service.precision.base import LinearGroup
from service.precision.linear import LinearSpec
from service.precision.w4 import W4Linear

CPU = torch.device("cpu")
IN, OUTS = 256, (128, 64, 64)
HALF = torch.float16


def group(dtype: torch.dtype = HALF) -> LinearGroup:
    parts = tuple(LinearSpec(f"part{i}", IN, out, bias=i != 1) for i, out in enumerate(OUTS))
    return LinearGroup("qkv_proj", parts, CPU, dtype)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """Of 16-bit and of AWQ's checkpoints."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for i, out in enumerate(OUTS):
        found[f"part{i}.weight"] = torch.randn(out, IN, generator=generator).half() * 0.05
        found[f"part{i}.bias"] = torch.randn(out, generator=generator).half()
        codes, zeros = (torch.randint(0, 16, (n, out), generator=generator) for n in (IN, IN // 128))
        found[f"part{i}.qweight"], found[f"part{i}.qzeros"] = pack(codes), pack(zeros)
        found[f"part{i}.scales"] = torch.rand(IN // 128, out, generator=generator).half() * 0.01
    return found


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the reference were the GPU's kernels."""
    monkeypatch.setattr(w4, "serves", lambda group, shape: not w4.w4_linear.refusal(shape))


@pytest.mark.parametrize("precision", ["awq", "nf4", "int3", "int3:group=128"])
def test_it_is_the_backend_s_own_layer(precision: str, tensors: dict[str, Tensor], everywhere: None) -> None:
    """Part by part and as a product, biases included."""
    ours = load_backend(precision).build(group(), tensors.__getitem__)
    assert isinstance(ours, W4Linear)
    assert ours.kernel == "reference.w4_linear"
    own = load_backend(precision).build(group(torch.float32), tensors.__getitem__)
    assert not isinstance(own, W4Linear)
    for part, out in enumerate(OUTS):
        assert ours.dense(part).shape == (out, IN)
        # bitsandbytes may multiply and add the offset in one
        torch.testing.assert_close(ours.dense(part), own.dense(part), rtol=1e-5, atol=1e-7)
    x = torch.randn(5, IN).half()
    weight = torch.cat([ours.dense(part) for part in range(len(OUTS))])
    bias = torch.cat([tensors["part0.bias"], torch.zeros(64), tensors["part2.bias"]]).float()
    want = F.linear(x.float(), weight, bias)
    y = ours(x)
    assert y.dtype == HALF
    assert (y.float() - want).norm() < 1e-3 * want.norm()
    assert not ours.row_invariant


@pytest.mark.parametrize(
    ("precision", "bits"),
    [("awq", 4.156), ("nf4", 4.127), ("int3", 3 + 20 / 64), ("int3:group=128", 3 + 20 / 128)],
)
def test_bytes_are_those_of_the_buffers(
    precision: str, bits: float, tensors: dict[str, Tensor], everywhere: None
) -> None:
    layer = load_backend(precision).build(group(), tensors.__getitem__)
    ledger = layer.bytes()
    assert sum(ledger.values()) == sum(buffer.nbytes for buffer in layer.buffers())
    assert ledger.pop("linear16") == sum(OUTS) * 2
    assert ("zeros" in ledger) == (precision != "nf4")
    # three parts of few weights: a nested absmax and an offset each
    room = 0.01 if precision == "nf4" else 1e-4
    assert 8 * sum(ledger.values()) / (sum(OUTS) * IN) == pytest.approx(bits, rel=room)
    if precision != "awq":  # whose group is chosen for a model
        told = parse_precision(precision).sizes("qkv_proj", layer.group.parts, 2)
        assert {part: told[part] for part in ledger} == ledger


@pytest.mark.parametrize("precision", ["nf4:double_quant=off", "awq", "int3"])
def test_what_the_table_refuses_is_the_backend_s(
    precision: str, tensors: dict[str, Tensor], everywhere: None
) -> None:
    dtype = HALF if precision.startswith("nf4") else torch.float32
    layer = load_backend(precision).build(group(dtype), tensors.__getitem__)
    assert not isinstance(layer, W4Linear)


def test_the_log_says_once_why_a_layer_is_not_served(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(w4.w4_linear, "absence", lambda: "")
    w4.tell_refusal.cache_clear()
    on_gpu = replace(group(torch.float32), device=torch.device("cuda"))
    with caplog.at_level(logging.INFO, w4.logger.name):
        for _ in range(2):
            assert not w4.serves(on_gpu, w4.shape_of(on_gpu, "nf4", 64))
        half = replace(on_gpu, dtype=HALF)
        assert w4.serves(half, w4.shape_of(half, "nf4", 64))
        fixed = replace(half, deterministic=True)
        assert not w4.serves(fixed, w4.shape_of(fixed, "nf4", 64))
        assert not w4.serves(group(), w4.shape_of(group(), "nf4", 64))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "`qkv_proj`" in told[0]
    assert "float32" in told[0]
    assert "deterministic" in told[1]


def test_the_self_check_sees_every_kernel_of_a_plan(tensors: dict[str, Tensor], everywhere: None) -> None:
    """The table changes its kernel between the numbers of rows that all layers are checked with."""
    layer = load_backend("awq").build(group(), tensors.__getitem__)
    ends = sorted(layer.kernel_rows)
    assert {16, 64, 128} < set(ends)
    assert ends[-1] > max(ROWS)
    right = layer.forward
    check(layer, 0.02)
    for first, last in ((65, 128), (ends[-2] + 1, ends[-1]), (ends[-1] + 1, 10_000)):

        def wrong(x: Tensor, first: int = first, last: int = last) -> Tensor:
            return right(x) * (0.5 if first <= len(x) <= last else 1)

        layer.forward = wrong  # type: ignore[method-assign]
        with pytest.raises(DeviceError, match=f"at {min(last, ends[-1] + 1)} rows"):
            check(layer, 0.02)
