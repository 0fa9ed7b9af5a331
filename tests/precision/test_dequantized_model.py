"""The plain model beside the kernels: every mode's layers give what it gives, and a wrong layer does not."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make_checkpoint
from torch import Tensor

from service.engine.sources import open_model
from service.engine.startup import Serving, start
from service.messages import EngineConfig
from service.model.instance import GROUPS, ModelInstance
from service.precision.base import QuantLinear
from tests.benchmarks.dequantized_quality import apart, by_decode, by_prefill, verdict
from tests.dequantized_model import as_fp8_rows, as_int8_rows, dequantized

WINDOWS = [[(7 * i + 3 * w + i * i) % 128 for i in range(40)] for w in range(9)]
PRECISIONS = ("int8", "int8:threshold=1.5", "int8:skip=o_proj", "fp8", "nf4", "awq", "int3")
ROUNDING = 3e-5  # relative RMS of sums in float32; int8's outliers have sixteen bits
NATS = 0.1  # mean magnitude a token, of a model whose random weights amplify every rounding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, and in_features that every mode divides."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(path, "qwen2", torch.bfloat16, intermediate_size=128)
    return path


def served(
    folder: Path, precision: str, kernels: str, dtype: str = "auto", *, codes_activations: bool = True
) -> tuple[Serving, ModelInstance]:
    """-> the engine, and the plain model of its codes."""
    random = {"load_format": "random", "random_std": 0.15} if precision == "awq" else {}  # needs no text
    config = EngineConfig(
        **{"model_path": str(folder), "precision": precision, "device": "cpu", "kv_tokens": 1024}
        | {"dtype": dtype, "cpu_kernels": kernels, "max_batch_requests": 8}
        | random
    )
    source, _ = open_model(config, precision, torch.device("cpu"), lambda *_: None)
    serving = start(config, lambda _: None, 0.0)
    return serving, dequantized(serving.model, source, codes_activations=codes_activations)


def linears(model: ModelInstance) -> dict[str, QuantLinear]:
    layers = enumerate(model.layers())
    return {f"{name}.{index}": getattr(layer, name) for index, layer in layers for name in GROUPS}


def inputs(features: int) -> Tensor:
    """float32 that float16 holds, some beyond int8's threshold, and a row of zeros."""
    x = torch.randn(33, features, generator=torch.Generator().manual_seed(features)).half().float()
    x[3, 7], x[11, 0], x[11, 5], x[20] = 8.5, -6.0, 12.0, 0
    return x


def relative_rms(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_served_layers_are_what_their_codes_mean(folder: Path, precision: str, cpu_kernels: str) -> None:
    """In float32, where neither rounds its result: one code, or one outlier, that is another would show."""
    serving, plain = served(folder, precision, cpu_kernels, "fp32")
    meant = linears(plain)
    for name, linear in linears(serving.model).items():
        x = inputs(linear.group.in_features)
        assert relative_rms(linear(x), meant[name](x)) < ROUNDING, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_ways_score_the_same_tokens(folder: Path, precision: str, cpu_kernels: str) -> None:
    """In bfloat16, by the kernels that serve it: what is left is rounding, and a code or two."""
    serving, plain = served(folder, precision, cpu_kernels)
    base = torch.tensor(by_prefill(plain, WINDOWS))
    assert base.shape == (len(WINDOWS), len(WINDOWS[0]) - 1)
    prefill = by_prefill(serving.model, WINDOWS)
    eight, one = by_decode(serving, WINDOWS, 8), by_decode(serving, WINDOWS[:1], 1)
    for nats in (prefill, eight, one):
        assert (torch.tensor(nats) - base[: len(nats)]).abs().mean() < NATS
    assert (base.roll(1, 1) - base).abs().mean() > 10 * NATS, "another token's nats are others"
    serving.engine.check()
    assert serving.engine.cache.num_held == 0


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_weights_alone_leave_activations_in_16_bits(folder: Path, precision: str, cpu_kernels: str) -> None:
    serving, plain = served(folder, precision, cpu_kernels, codes_activations=False)
    meant = linears(plain)
    for name, linear in linears(serving.model).items():
        x = inputs(linear.group.in_features).bfloat16()
        weight = torch.cat([linear.dense(part) for part in range(len(linear.group.parts))]).half()
        wanted = F.linear(x.float(), weight.float(), meant[name].bias)
        assert meant[name](x).equal(wanted.bfloat16())
        assert relative_rms(linear(x).float(), wanted) > 3e-3, "codes of activations cost something"


def test_rows_of_int8_by_hand() -> None:
    x = torch.tensor([[127.0, 1.4, -2.6, 0.5], [6.0, 1.27, -0.014, -7.5], [0.0, 0.0, 0.0, 0.0]])
    assert as_int8_rows(0)(x)[0].tolist() == [127, 1, -3, 0]
    got = as_int8_rows(6.0)(x)
    assert got[0].tolist() == pytest.approx([127, 1.4, -2.6, 0.5], abs=0.011)  # 2.6 is the largest code now
    assert got[:2, 0].tolist() == [127, 6]
    assert got[1].tolist() == pytest.approx([6, 1.27, -0.01, -7.5], abs=1e-3)
    assert got[2].tolist() == [0, 0, 0, 0]


def test_rows_of_fp8_by_hand() -> None:
    got = as_fp8_rows(torch.tensor([[448.0, 17.0, 1.1], [0.0, 0.0, 0.0], [-0.875, 0.5, 0.036]]))
    assert got[0].tolist() == [448, 16, 1.125]  # 17 lies between 16 and 18
    assert got[1].tolist() == [0, 0, 0]
    assert got[2].tolist() == pytest.approx([-0.875, 0.5, 0.0352], abs=1e-4)  # 18 of 512ths


def test_what_is_apart_is_paired_by_token() -> None:
    base = [[1.0, 5.0, 2.0], [3.0, 0.5, 1.0], [9.0]]
    ours = [[value + 0.01 for value in window] for window in base[:2]]
    percent, error = apart(ours, base)
    assert percent == pytest.approx(1.005, abs=1e-3)
    assert error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("percent", "error", "wanted"),
    [
        *[(0.1, 0.1, "yes"), (-0.2, 0.2, "yes"), (-0.7, 0.1, "no"), (2.0, 0.5, "no")],
        *[(0.3, 0.1, "undecided"), (0.0, 0.3, "undecided"), (1.0, float("inf"), "undecided")],
    ],
)
def test_a_verdict_is_no_more_than_the_error_allows(percent: float, error: float, wanted: str) -> None:
    assert verdict(percent, error) == wanted
