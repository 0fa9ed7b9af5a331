"""Weights that a reader misunderstood: refused at the start, and plain in every figure of quality if not."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from service.engine.evaluate import Evaluation
from service.engine.likelihood import LikelihoodCheck
from service.engine.startup import start
from service.errors import CheckpointError
from service.messages import EngineConfig, Evaluate, Evaluated
from service.precision import awq
from service.precision.base import LinearSpec, Read
from tests.e2e.demo_server import prose
from tests.e2e.int4_checkpoint import round_to_int4
from tests.engine.test_likelihood import Tensors, order_ignored, zeros_off_by_one

pytestmark = pytest.mark.demo
WINDOW_TOKENS = 65


@pytest.fixture(scope="module")
def quantized(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq") / "demo"
    round_to_int4(demo_model, folder)
    return folder


def quality(quantized: Path, source: Path) -> Evaluated:
    """Beside the 16-bit checkpoint that it was made from, on two windows of prose."""
    config = EngineConfig(model_path=str(quantized), precision="awq", device="cpu", kv_tokens=256)
    serving = start(config, lambda _: None, time.monotonic())
    ids = prose(source)
    windows = [ids[start : start + WINDOW_TOKENS] for start in (0, 500)]
    sent: list[Evaluated] = []
    asked = Evaluate(1, windows, ["prefill"], reference="bf16", reference_path=str(source))
    Evaluation(asked, serving, config, sent.append).run()
    assert not sent[-1].error
    return sent[-1]


@pytest.fixture(scope="module")
def right(quantized: Path, demo_model: Path) -> Evaluated:
    return quality(quantized, demo_model)


@pytest.mark.parametrize("misread", [order_ignored, zeros_off_by_one])
def test_a_wrong_nibble_order_and_a_zero_off_by_one_are_found(
    quantized: Path,
    demo_model: Path,
    right: Evaluated,
    monkeypatch: pytest.MonkeyPatch,
    misread: Callable[..., Tensors],
) -> None:
    read_part = awq.read_part

    def wrong(part: LinearSpec, read: Read) -> Tensors:
        return misread(*read_part(part, read))

    monkeypatch.setattr(awq, "read_part", wrong)
    with pytest.raises(CheckpointError, match="does not know its language"):
        quality(quantized, demo_model)
    monkeypatch.setattr(LikelihoodCheck, "__call__", lambda *_: None)
    found = quality(quantized, demo_model)
    # with room: rounding to the nearest of 16 codes costs some of the language, misreading them all of it
    assert found.kl_mean - 4 * found.kl_standard_error > 5 * right.kl_mean
    assert right.top1_agreement > 0.4 > 0.1 > found.top1_agreement
    assert found.against_reference is not None
    assert found.against_reference.mean > 3
