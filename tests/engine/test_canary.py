"""The canary: its figures, what it finds that the self-check cannot, and where nothing can be compared."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import load_instance, logits_of, make_checkpoint
from torch import Tensor

from service.engine import canary
from service.engine.canary import BOUNDS, CanaryError, check_canary, fixed_tokens
from service.engine.likelihood import tokenize
from service.engine.self_check import check_linears, check_weights
from service.engine.startup import start
from service.engine.streamed import StreamedModel
from service.messages import EngineConfig, Loading
from service.model.checkpoint import Checkpoint
from service.model.instance import GROUPS, ModelInstance
from service.model.random_weights import Draw, RandomWeights
from service.precision import TABLE, load_backend

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    make_checkpoint(folder, "llama", torch.bfloat16, intermediate_size=128)
    return folder


def config_of(folder: Path, precision: str, **settings: Any) -> EngineConfig:
    return EngineConfig(model_path=str(folder), precision=precision, device="cpu", kv_tokens=256, **settings)


def check(model: ModelInstance, folder: Path, **settings: Any) -> dict[str, float | str]:
    return check_canary(model, config_of(folder, "auto", **settings), lambda *_: None)


def divergence(reference: Tensor, served: Tensor) -> float:
    """Mean over rows, in float64, by the definition."""
    p, q = (logits.double().log_softmax(-1) for logits in (reference, served))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_figures_are_those_of_the_definition(tiny: Path) -> None:
    served, reference = load_instance(tiny, "nf4"), load_instance(tiny, "bf16")
    found = check(served, tiny)
    ids = fixed_tokens(served, tiny)
    assert len(ids) == found["tokens"] == 80
    assert found["reference"] == "bf16"
    wanted, got = logits_of(reference, ids), logits_of(served, ids)
    assert found["prefill_kl_nats"] == pytest.approx(divergence(wanted[:64], got[:64]), rel=0.02)
    # decoded by other kernels than `logits_of`, so that rounding differs
    assert found["decode_kl_nats"] == pytest.approx(divergence(wanted[64:], got[64:]), rel=0.1)
    assert found["bound_nats"] == BOUNDS["nf4"].nats


def test_every_precision_has_a_bound() -> None:
    assert set(BOUNDS) == set(TABLE)


def swapped_nibbles(codes: Tensor) -> Tensor:
    return codes >> 4 | codes << 4


def codes_of(model: ModelInstance) -> list[Tensor]:
    """The first buffer of 8-bit words of each linear: NF4's codes."""
    linears = [getattr(layer, name) for layer in model.layers() for name in GROUPS]
    return [next(b for b in linear.buffers() if b.dtype == torch.uint8) for linear in linears]


@pytest.mark.demo
def test_nibbles_in_a_wrong_order_are_found(demo_model: Path) -> None:
    """Kernels and weights agree with each other, so the check of the kernels has nothing to find."""
    model = load_instance(demo_model, "nf4")
    healthy = check(model, demo_model)
    assert 0.05 < float(healthy["prefill_kl_nats"]) < BOUNDS["nf4"].nats / 2
    assert 0.2 < float(healthy["layer_error"]) < BOUNDS["nf4"].layer / 1.5
    assert fixed_tokens(model, demo_model) == tokenize(demo_model)[:80]
    for codes in codes_of(model):
        codes.copy_(swapped_nibbles(codes))
    check_linears(model)
    with pytest.raises(CanaryError, match=r"precision `nf4` is \d\d\.\d\d nats a token off `bf16`") as told:
        check(model, demo_model)
    assert told.value.code == "canary_failed"


@pytest.mark.demo
@pytest.mark.parametrize("layer", [7, 24])  # where NF4 is roughest, and where the fault shows least
def test_one_linear_of_one_layer_is_found(demo_model: Path, layer: int) -> None:
    """At the end it may be less than NF4 is off by itself; the layer adds something else."""
    model = load_instance(demo_model, "nf4")
    for codes in codes_of(model)[layer * len(GROUPS) : (layer + 1) * len(GROUPS)]:
        codes.copy_(swapped_nibbles(codes))
        check_linears(model)
        check_weights(model, Checkpoint(demo_model))  # of the first layer
        with pytest.raises(CanaryError, match=rf"what layer {layer} adds is \d+% off"):
            check(model, demo_model)
        codes.copy_(swapped_nibbles(codes))


def test_what_a_layer_adds_is_held_against_the_reference(tiny: Path) -> None:
    """Behind the reference's stream, so that a fault does not spread into the layers after it."""
    model = load_instance(tiny, "fp32")
    assert float(check(model, tiny)["layer_error"]) < 0.02
    gain = model.layers()[1].input_norm
    gain.neg_()
    errors = canary.LayerErrors(model, fixed_tokens(model, tiny))
    source = Checkpoint(tiny)
    reference = StreamedModel(source, load_backend("bf16"), CPU)
    reference.through([fixed_tokens(model, tiny)], lambda _: None, errors)
    assert [float(error) > 1 for error in errors._errors] == [False, True, False]
    assert errors.worst[0] == 1
    gain.fill_(torch.nan)
    reference.through([fixed_tokens(model, tiny)], lambda _: None, errors)
    assert math.isnan(errors.worst[1])


def test_numbers_that_are_none_are_found(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_instance(tiny, "bf16")
    monkeypatch.setattr(
        model, "forward", lambda batch, kv: torch.full((len(batch.logit_rows), 128), torch.nan)
    )
    with pytest.raises(CanaryError):
        check(model, tiny)


def test_three_bits_have_the_bound_of_three_bits(tiny: Path) -> None:
    model = load_instance(RandomWeights(tiny, CPU, Draw()), "nf4")
    for precision, bound in (("nf4", "nf4"), ("awq", "awq"), ("awq:bits=3", "int3")):
        model.backend = load_backend(precision)
        assert canary.bound_of(model) == BOUNDS[bound]


def test_where_nothing_can_be_compared_it_says_so(tiny: Path) -> None:
    model = load_instance(tiny, "nf4")
    quantized = Checkpoint(tiny)
    quantized.quantization = {"quant_method": "awq"}
    assert "the checkpoint is quantized" in canary.no_reference(model, quantized)
    drawn = RandomWeights(tiny, CPU, Draw())
    assert canary.no_reference(model, drawn) == ""
    model.backend = load_backend("awq")
    assert "were drawn in `awq`" in canary.no_reference(model, drawn)
    found = check(model, tiny, load_format="random")
    assert set(found) == {"reference"}
    assert str(found["reference"]).startswith("none: ")


def test_a_short_context_is_long_enough(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "llama", torch.bfloat16, max_position_embeddings=40)
    assert check(load_instance(tmp_path, "bf16"), tmp_path)["tokens"] == 40


def test_an_engine_sings_when_it_is_asked_to(tiny: Path) -> None:
    sent: list[Loading] = []
    serving = start(config_of(tiny, "int8", canary=True), sent.append, 0.0)
    assert 0 <= float(serving.info.canary["prefill_kl_nats"]) < BOUNDS["int8"].nats
    last = [loading for loading in sent if loading.stage == "canary"][-1]
    assert (last.done, last.total, last.unit) == (80, 80, "tokens")
    assert start(config_of(tiny, "int8"), lambda _: None, 0.0).info.canary == {}
