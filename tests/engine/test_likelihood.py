"""A quantized checkpoint that is read wrongly is refused: no other check before ready can see it."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import make_checkpoint
from tiny_tokenizers import write_checkpoint
from torch import Tensor

from service.engine import likelihood
from service.engine.likelihood import LikelihoodCheck, nats_per_token, tokenize
from service.engine.startup import start
from service.errors import CheckpointError
from service.kernels.awq_linear.reference import NIBBLE_TO_COLUMN, pack, unpack
from service.messages import EngineConfig
from service.model.checkpoint import Checkpoint
from service.model.instance import ModelInstance
from service.model.random_weights import Draw, RandomWeights
from service.precision import awq, load_backend
from service.precision.base import Read
from service.precision.linear import LinearSpec
from service.quantize.awq import Grid
from service.quantize.awq_checkpoint import quantization_config
from tests.e2e.int4_checkpoint import round_to_int4

CPU = torch.device("cpu")
Tensors = tuple[Tensor, Tensor, Tensor]


def nibbles_swapped(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensors:
    return (codes & 0x0F0F0F0F) << 4 | codes >> 4 & 0x0F0F0F0F, zeros, scales


def in_order(words: Tensor) -> Tensor:
    """The same codes for a reader that takes nibbles as they come."""
    columns = unpack(words).unflatten(-1, (-1, 8))
    return pack(columns[..., list(NIBBLE_TO_COLUMN)].flatten(-2))


def order_ignored(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensors:
    return in_order(codes), in_order(zeros), scales


def zeros_off_by_one(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensors:
    return codes, pack(unpack(zeros).int().sub(1).clamp(min=0)), scales


def scales_of_other_groups(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensors:
    return codes, zeros, scales.t().reshape(scales.shape).contiguous()


@pytest.fixture(scope="module")
def quantized(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq") / "demo"
    round_to_int4(demo_model, folder)
    return folder


@pytest.mark.demo
def test_a_checkpoint_that_is_read_rightly_passes(quantized: Path, demo_model: Path) -> None:
    """With room: in 16 bits it is as likely, and the text of a tenth of the tokens would do."""
    source = Checkpoint(quantized)
    check = LikelihoodCheck.of(source, quantized)
    assert check is not None
    model = ModelInstance.load(source, load_backend("awq"), CPU)
    check(model)
    ids = tokenize(quantized)
    assert 64 < len(ids) <= likelihood.MAX_TOKENS
    chance = math.log(model.config.vocab_size)
    with torch.inference_mode():
        assert nats_per_token(model, ids) < 0.25 * chance
        assert nats_per_token(model, ids[:16]) < likelihood.BOUND * chance


@pytest.mark.demo
@pytest.mark.parametrize(
    "misread", [nibbles_swapped, order_ignored, zeros_off_by_one, scales_of_other_groups]
)
def test_a_wrong_reader_is_seen(
    quantized: Path, monkeypatch: pytest.MonkeyPatch, misread: Callable[..., Tensors]
) -> None:
    right = awq.read_part

    def wrong(part: LinearSpec, read: Read) -> Tensors:
        return misread(*right(part, read))

    monkeypatch.setattr(awq, "read_part", wrong)
    source = Checkpoint(quantized)
    check = LikelihoodCheck.of(source, quantized)
    assert check is not None
    with pytest.raises(CheckpointError, match="`awq`") as error:
        check(ModelInstance.load(source, load_backend("awq"), CPU))
    assert str(quantized) in error.value.message
    assert "nats a token" in error.value.message
    assert error.value.hint


@pytest.fixture
def random_awq(tmp_path: Path) -> Path:
    """Of random weights and no word of it: its maker left no manifest."""
    folder, out = tmp_path / "random", tmp_path / "quantized"
    folder.mkdir()
    write_checkpoint(folder, "byte_level")
    make_checkpoint(folder, "llama", torch.bfloat16, intermediate_size=128, vocab_size=512)
    round_to_int4(folder, out)
    return out


def test_weights_without_meaning_are_refused_unless_they_are_said_to_be(
    random_awq: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model_path=str(random_awq), device="cpu", precision="auto")
    with pytest.raises(CheckpointError, match="does not know its language"):
        start(config, lambda _: None, 0.0)
    (random_awq / "tokenizer.json").unlink()
    with caplog.at_level(logging.WARNING):
        start(config, lambda _: None, 0.0)
    assert "no tokenizer.json" in caplog.text


def test_who_is_not_asked(random_awq: Path, tmp_path: Path) -> None:
    """16-bit weights, which nobody unpacks, and weights that were drawn."""
    assert LikelihoodCheck.of(Checkpoint(random_awq), random_awq) is not None
    plain = tmp_path / "plain"
    plain.mkdir()
    write_checkpoint(plain, "byte_level")
    make_checkpoint(plain, "llama", torch.bfloat16)
    assert LikelihoodCheck.of(Checkpoint(plain), plain) is None
    drawn = RandomWeights(plain, CPU, Draw(), quantization_config(Grid(4, 32)))
    assert drawn.quantization is not None
    assert LikelihoodCheck.of(drawn, plain) is None


@pytest.mark.parametrize(("nats", "passes"), [(0.49, True), (0.51, False), (math.nan, False)])
def test_the_bound(random_awq: Path, monkeypatch: pytest.MonkeyPatch, nats: float, passes: bool) -> None:
    model = ModelInstance.load(random_awq, load_backend("awq"), CPU)
    check = LikelihoodCheck.of(Checkpoint(random_awq), random_awq)
    assert check is not None
    monkeypatch.setattr(likelihood, "nats_per_token", lambda *_: nats * math.log(512))
    if passes:
        check(model)
    else:
        with pytest.raises(CheckpointError):
            check(model)


def test_a_short_context_takes_the_beginning(random_awq: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelInstance.load(random_awq, load_backend("awq"), CPU, max_context_tokens=20)
    lengths: list[int] = []
    monkeypatch.setattr(likelihood, "nats_per_token", lambda _, ids: lengths.append(len(ids)) or 0.0)
    check = LikelihoodCheck.of(Checkpoint(random_awq), random_awq)
    assert check is not None
    check(model)
    assert lengths == [20]
