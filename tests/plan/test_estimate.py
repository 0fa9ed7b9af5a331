"""A plan against the ledger of the engine that it planned: every precision, to the byte."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import SHAPE

from service.engine.penalties import Penalties
from service.engine.startup import start
from service.engine.state import DeviceState
from service.kernels import native
from service.ledger import BLOCK_TOKENS, PARTS, kv_bytes, weight_bytes
from service.messages import EngineConfig
from service.model.batch import BLOCK_TOKENS as ENGINE_BLOCK_TOKENS
from service.model.instance import ModelInstance
from service.model.random_weights import Draw, RandomWeights
from service.model.sizes import for_model, kv_token_bytes, rotary_bytes, weight_parts
from service.plan.devices import Device
from service.plan.estimate import Serving, estimate, request_bytes
from service.plan.shape import read_config_alone, read_folder
from service.precision import TABLE, load_backend, parse_precision
from service.quantize import packing

CPU = torch.device("cpu")
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SHAPE}
WIDE = {**LLAMA, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256}  # our own kernels serve it
MACHINE = Device("a machine", 64 << 30, is_gpu=False)
COUNTED = ("weights", "tables", "kv")  # what does not depend on the process
GIB = 1 << 30


def folder_of(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def counted(parts: dict[str, int]) -> dict[str, int]:
    return {part: size for part, size in parts.items() if size and part.partition(".")[0] in COUNTED}


# without our own CPU kernels: bitsandbytes' want whole blocks of absmax codes, torch's a byte for each zero
OTHERWISE_HELD = ("nf4", "awq") if native.load() is None else ()


@pytest.mark.parametrize("precision", TABLE)
def test_a_plan_is_the_ledger_of_its_engine(tmp_path: Path, precision: str) -> None:
    """Half of the modes with a head of its own, an 8-bit cache and a window that was asked for."""
    is_plain = list(TABLE).index(precision) % 2 == 0
    folder = folder_of(tmp_path / "tiny", {**WIDE, "tie_word_embeddings": is_plain})
    asked = EngineConfig(
        model_path=str(folder),
        precision=precision,
        device="cpu",
        load_format="random",
        kv_dtype="auto" if is_plain else "int8",
        kv_tokens=512,
        max_batch_requests=5,
        max_context_tokens=0 if is_plain else 100,
    )
    held = start(asked, lambda message: None, 0.0).info.memory_bytes
    config = read_config_alone(folder).config
    mode = for_model(parse_precision(precision), config)
    serving = Serving(5, 512, 0.9, kv_tokens=512, max_context_tokens=asked.max_context_tokens)
    planned = estimate(config, mode, asked.kv_dtype, MACHINE, serving)
    assert planned.kv_tokens == 512
    assert BLOCK_TOKENS == ENGINE_BLOCK_TOKENS
    if precision in OTHERWISE_HELD:
        more = sum(counted(held).values()) - sum(counted(planned.parts).values())
        assert 0 < more < 0.03 * sum(counted(held).values())
        return
    assert counted(planned.parts) == counted(held)


@pytest.mark.parametrize("precision", [*TABLE, "nf4:double_quant=off", "int8:skip=o_proj+down_proj"])
def test_weights_of_the_demo_s_width(tmp_path: Path, precision: str) -> None:
    """One of its layers, and fewer words: 576 features, which 128 does not divide."""
    demo = {
        **LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 1,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 1024,
    }  # fmt: skip
    source = RandomWeights(folder_of(tmp_path / "demo", demo), CPU, Draw())
    backend = load_backend(precision)
    if backend.quantizer:
        source = source.quantized(packing(source.config, backend))
    dtype = backend.activation_dtype(CPU, source.dtype)
    held = ModelInstance.load(source, backend, CPU, dtype)
    mode = for_model(parse_precision(precision), source.config)
    planned = weight_bytes(weight_parts(source.config, mode, dtype.itemsize, "16bit"))
    if precision in OTHERWISE_HELD:
        assert 0 < held.weight_bytes - planned < 0.01 * planned
        return
    assert planned == held.weight_bytes


@pytest.mark.demo
def test_the_demo_itself(demo_model: Path) -> None:
    held = ModelInstance.load(demo_model, load_backend("bf16"), CPU)
    shape = read_folder(demo_model)
    planned = weight_parts(shape.config, parse_precision("bf16"), 2, "16bit")
    assert weight_bytes(planned) == held.weight_bytes
    assert shape.num_parameters == held.num_parameters
    told = held.memory_bytes()
    assert told["tables.rotary"] == rotary_bytes(shape.config, shape.config.max_context_tokens)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_kv_bytes_are_those_of_the_cache(tmp_path: Path, kv_dtype: str) -> None:
    codes = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kv_dtype)
    source = RandomWeights(folder_of(tmp_path, WIDE), CPU, Draw())
    model = ModelInstance.load(source, load_backend("bf16"), CPU, kv_dtype=codes)
    assert 16 * kv_token_bytes(source.config, kv_dtype, 2) == model.kv_block_bytes


def test_rows_of_requests(tmp_path: Path) -> None:
    config = read_config_alone(folder_of(tmp_path, LLAMA)).config
    held = DeviceState(7, 200, CPU).bytes + Penalties(8, config.vocab_size, CPU).bytes
    assert request_bytes(config, 7, 200) == held


@pytest.mark.parametrize("is_gpu", [True, False])
def test_all_parts_are_the_ledger_s(tmp_path: Path, is_gpu: bool) -> None:
    config = read_config_alone(folder_of(tmp_path, WIDE)).config
    device = Device("x", 8 * GIB, is_gpu=is_gpu)
    found = estimate(config, parse_precision("nf4"), "auto", device, Serving(8, 512, 0.9))
    assert list(found.parts) == [part.name for part in PARTS]
    assert all(size >= 0 for size in found.parts.values())
    assert found.total_bytes <= 8 * GIB
    assert found.kv_tokens > 100_000


def test_the_cache_gets_its_share_of_what_is_left(tmp_path: Path) -> None:
    """Half of twice as much is as much; where two blocks find no room there is none."""
    config = read_config_alone(folder_of(tmp_path, WIDE)).config
    mode = parse_precision("bf16")

    def tokens(memory_bytes: int, fraction: float) -> int:
        return estimate(config, mode, "auto", Device("x", memory_bytes), Serving(8, 512, fraction)).kv_tokens

    served = Serving(8, 512, 0.9, kv_tokens=1 << 24)  # more than there is: refused, not cut
    none = estimate(config, mode, "auto", Device("x", 2 * GIB), served)
    assert (none.kv_tokens, kv_bytes(none.parts)) == (0, 0)
    assert tokens(none.fixed_bytes + 2 * GIB, 0.4) == pytest.approx(
        tokens(none.fixed_bytes + GIB, 0.8), rel=0.01
    )
    assert tokens(none.fixed_bytes // 2, 0.9) == 0


def test_weights_of_llama_3_1_8b() -> None:
    """GB of the whole model, computed by hand from its config.json."""
    config = read_config_alone(Path(__file__).parents[2] / "service/model/presets/llama-3.1-8b").config
    expected = {"bf16": 16.061, "int8": 9.087, "fp8": 9.087, "nf4": 5.702, "nf4:double_quant=off": 6.028}
    expected |= {"awq": 5.728, "awq:group=64": 5.864, "int3:group=128": 4.855}
    for text, gigabytes in expected.items():
        sizes = weight_parts(config, for_model(parse_precision(text), config), 2, "16bit")
        assert sum(sizes.values()) / 1e9 == pytest.approx(gigabytes, abs=0.001), text
    assert kv_token_bytes(config, "auto", 2) == 131_072


def test_awq_takes_the_group_of_the_checkpoint() -> None:
    config: Any = SimpleNamespace()
    assert for_model(parse_precision("awq"), config, group_size=32).options.model_dump()["group"] == 32
