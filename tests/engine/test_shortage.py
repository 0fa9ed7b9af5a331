"""A device without room is told with what was needed, on the way to ready and never by a trace."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, make_checkpoint

from service.engine.shortage import MIB, weight_bytes
from service.engine.startup import start
from service.errors import DeviceError
from service.kernels import native
from service.messages import EngineConfig
from service.model.decoder import Decoder, DecoderLayer
from service.model.instance import ModelInstance
from service.model.random_weights import Draw, RandomWeights
from service.model.sizes import all_linears
from service.precision import TABLE, load_backend
from service.precision.sizes import NESTED_BLOCK
from service.quantize import packing

CPU = torch.device("cpu")
WIDE = {
    "vocab_size": 65536,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}  # megabytes enough to be told apart


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_checkpoint(folder, "llama", torch.bfloat16, **WIDE)
    return folder


def told(folder: Path, hint: str = "`kv_tokens`", **settings: Any) -> str:
    """What a start that must fail says."""
    with pytest.raises(DeviceError) as caught:
        start(EngineConfig(model_path=str(folder), device="cpu", **settings), lambda _: None, 0.0)
    assert hint in caught.value.hint
    for figure in ("MiB free of", "MiB held by this process"):
        assert figure in caught.value.message
    return caught.value.message


def no_room(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def full_after(number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, for which there is room so many times."""
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return no_room() if calls > number else call(*arguments, **options)

    return counted


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("head", ["16bit", "int8"])
@pytest.mark.parametrize("precision", [*TABLE, "int8:skip=down_proj", "nf4:double_quant=off"])
def test_the_estimate_is_what_a_loaded_model_holds(
    tmp_path: Path, precision: str, head: Any, tied: bool
) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE, "intermediate_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    source, backend = RandomWeights(tmp_path, CPU, Draw()), load_backend(precision)
    if backend.quantizer:
        source = source.quantized(packing(source.config, backend))
    dtype = backend.activation_dtype(CPU, source.dtype)
    held = ModelInstance.load(source, backend, CPU, dtype, head=head).weight_bytes
    # bitsandbytes' own kernels serve these narrow shapes, and want whole blocks of absmax codes
    rounded_up = NESTED_BLOCK * len(all_linears(source.config)) * source.config.num_layers
    estimate = weight_bytes(source, backend, dtype, head)
    if precision == "awq" and native.load() is None:  # torch's product wants each zero in a byte
        assert 0 < held - estimate < 0.02 * held
        return
    assert estimate == held or (precision == "nf4" and 0 < held - estimate < rounded_up)


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_weights_that_find_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """In the middle of loading: what had its place already does not count as room."""
    needed = ModelInstance.load(folder, load_backend(precision), CPU).weight_bytes // MIB
    assert needed >= 8
    monkeypatch.setattr(DecoderLayer, "__init__", full_after(1, DecoderLayer.__init__))
    assert f"the weights in `{precision}`: needed {needed} MiB" in told(folder, precision=precision)


def test_a_mode_that_is_made_from_more_than_there_is_room_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("service.quantize.prepare", no_room)
    message = told(folder, "`halftone quantize --device cpu`", precision="awq", cache_dir=str(tmp_path))
    assert "no room for one layer at a time of the 16-bit weights that `awq` is made from" in message


def test_a_first_step_that_finds_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told as a precision that fails."""
    monkeypatch.setattr(Decoder, "forward", no_room)
    assert "no room for a step of 32 tokens beside" in told(folder, precision="bf16")


def test_a_cache_that_finds_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size fitted a moment ago: something else took the memory, or it lies in pieces."""
    tokens = 65536
    block_bytes = ModelInstance.load(folder, load_backend("bf16"), CPU).kv_block_bytes
    new_kv = ModelInstance.new_kv

    def full(model: ModelInstance, num_blocks: int) -> Any:
        return no_room() if num_blocks > tokens // 16 else new_kv(model, num_blocks)

    monkeypatch.setattr(ModelInstance, "new_kv", full)
    message = told(folder, precision="bf16", kv_tokens=tokens)
    assert (
        f"a KV cache of {tokens} tokens in bf16: needed {(tokens // 16 + 1) * block_bytes // MIB} MiB"
        in message
    )
