"""Checkpoints that bitsandbytes quantized: its own bytes, read, are what quantizing in flight makes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant, quantize_4bit
from safetensors.torch import load_file, save_file
from tiny_models import load_instance, logits_of, make_checkpoint
from torch import Tensor

from service.engine.shortage import weight_bytes
from service.engine.startup import start
from service.errors import CheckpointError, PrecisionError
from service.messages import EngineConfig
from service.model.checkpoint import Checkpoint
from service.model.instance import ModelInstance
from service.precision import backend_of, load_backend
from service.precision.sizes import NESTED_BLOCK

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
NESTED = FOUR | {"bnb_4bit_use_double_quant": True}
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "attention_bias": True}
MODES = [("nf4", NESTED), ("nf4:double_quant=off", FOUR), ("int8", EIGHT)]


def as_saved(weight: Tensor, quantization: dict[str, Any]) -> dict[str, Tensor]:
    """What transformers' save_pretrained writes of a linear that bitsandbytes has quantized."""
    if quantization is EIGHT:
        codes, scales, _ = int8_vectorwise_quant(weight.half())
        return {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    nested = "bnb_4bit_use_double_quant" in quantization
    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    return {"weight": codes} | {f"weight.{name}": t for name, t in state.as_dict(packed=True).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    make_checkpoint(folder, "llama", torch.bfloat16, **SHAPE)
    return folder


def quantized(plain: Path, folder: Path, quantization: dict[str, Any]) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            saved = as_saved(tensor, quantization)
            tensors |= {f"{name.removesuffix('weight')}{key}": value for key, value in saved.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("precision", "quantization"), MODES)
def test_it_is_what_quantizing_in_flight_makes(
    plain: Path, tmp_path: Path, precision: str, quantization: dict[str, Any]
) -> None:
    folder = quantized(plain, tmp_path, quantization)
    read = load_instance(folder, precision)
    made = load_instance(plain, precision)
    tokens = [3, 17, 90, 5, 44, 101, 7]
    assert torch.equal(logits_of(read, tokens), logits_of(made, tokens))
    for ours, theirs in zip(read.layers(), made.layers(), strict=True):
        for part in range(3):
            assert torch.equal(ours.qkv_proj.dense(part), theirs.qkv_proj.dense(part))
    assert read.weight_bytes == made.weight_bytes
    # bitsandbytes' kernels want whole blocks of absmax codes
    told = weight_bytes(Checkpoint(folder), load_backend(precision), torch.bfloat16, "16bit")
    assert read.weight_bytes - 21 * NESTED_BLOCK < told <= read.weight_bytes


@pytest.mark.parametrize(("precision", "quantization"), MODES)
def test_a_backend_remembers_no_checkpoint(
    plain: Path, tmp_path: Path, precision: str, quantization: dict[str, Any]
) -> None:
    """One loads codes and then 16 bits, and again, as what it was asked last does not matter."""
    folder = quantized(plain, tmp_path, quantization)
    backend = load_backend(precision)
    for source in (folder, plain, folder):
        assert backend.accepts(None)
        assert backend.accepts(quantization)
        ModelInstance.load(source, backend, torch.device("cpu"))


@pytest.mark.parametrize(("precision", "quantization"), MODES)
def test_auto_is_what_the_checkpoint_is(
    plain: Path, tmp_path: Path, precision: str, quantization: dict[str, Any]
) -> None:
    folder = quantized(plain, tmp_path, quantization)
    serving = start(EngineConfig(model_path=str(folder), device="cpu", precision="auto"), lambda _: None, 0.0)
    assert serving.info.precision == precision


@pytest.mark.parametrize(
    ("quantization", "written"),
    [
        (NESTED, "nf4"),
        (FOUR, "nf4:double_quant=off"),
        (EIGHT, "int8"),
        (EIGHT | {"llm_int8_threshold": 5.5}, "int8:threshold=5.5"),
        (FOUR | {"bnb_4bit_quant_type": "fp4"}, None),
        ({"quant_method": "bitsandbytes"}, None),
    ],
)
def test_modes_by_config(quantization: dict[str, Any], written: str | None) -> None:
    backend = backend_of(quantization)
    assert (backend and backend.canonical) == written
    assert backend is None or backend.accepts(quantization)


@pytest.mark.parametrize(
    ("precision", "quantization", "named"),
    [
        ("nf4:double_quant=off", NESTED, "`nf4`"),
        ("nf4", FOUR, "off"),
        ("int8:skip=o_proj", EIGHT, "`o_proj`"),
    ],
)
def test_options_that_contradict_it(precision: str, quantization: dict[str, Any], named: str) -> None:
    with pytest.raises(PrecisionError, match=named):
        load_backend(precision).accepts(quantization)
    assert not load_backend("nf4").accepts(EIGHT)
    assert not load_backend("int8").accepts(FOUR)
    assert load_backend("int8:threshold=4").accepts(EIGHT)


def damaged(folder: Path, change: dict[str, Tensor]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    assert change.keys() <= tensors.keys()
    save_file(tensors | change, folder / "model.safetensors", {"format": "pt"})
    return folder


def state(**changes: Any) -> Tensor:
    told = {"quant_type": "nf4", "blocksize": 64, "shape": [128, 128], "dtype": "bfloat16"} | changes
    return torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)


O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({f"{O_PROJ}.weight": torch.zeros(128, 128).bfloat16()}, "left out of quantization"),
        ({f"{O_PROJ}.weight": torch.zeros(100, 1, dtype=torch.uint8)}, r"\[100, 1\]"),
        ({f"{O_PROJ}.weight.absmax": torch.zeros(5)}, "absmax"),
        ({f"{O_PROJ}.weight.quant_map": torch.linspace(-1, 1, 16)}, "quant_map"),
        ({f"{O_PROJ}.weight.quant_state.bitsandbytes__nf4": state(blocksize=128)}, "`blocksize` = `128`"),
        ({f"{O_PROJ}.weight.quant_state.bitsandbytes__nf4": state(shape=[64, 256])}, "shape"),
        ({f"{O_PROJ}.weight.quant_state.bitsandbytes__nf4": torch.ones(9, dtype=torch.uint8)}, "JSON"),
    ],
)
def test_what_the_kernels_would_misread_is_named(
    plain: Path, tmp_path: Path, change: dict[str, Tensor], named: str
) -> None:
    folder = damaged(quantized(plain, tmp_path, FOUR), change)
    with pytest.raises(CheckpointError, match=named) as error:
        load_instance(Checkpoint(folder), "nf4:double_quant=off")
    assert O_PROJ in error.value.message
    assert error.value.hint
