"""Random weights drawn on a CUDA device: values, time and memory of a whole 8B. `pytest -m gpu`, by hand."""

import gc
import time
from pathlib import Path

import pytest
import torch

from service import device as devices
from service.kernels.awq_linear.reference import dequantize, unpack
from service.model.checkpoint import Checkpoint
from service.model.hub import PRESETS
from service.model.instance import ModelInstance
from service.model.random_weights import Draw, RandomWeights, save_random
from service.precision import load_backend
from service.precision.base import Backend
from service.quantize import packing

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
GIB = 1 << 30


def source_of(preset: str, backend: Backend) -> RandomWeights:
    source = RandomWeights(PRESETS / preset, CUDA, Draw(outliers=4))
    return source.quantized(packing(source.config, backend)) if backend.quantizer else source


def test_values_are_as_on_a_cpu() -> None:
    source = source_of("llama-3.2-1b", load_backend("fp16"))
    weight = source.read("model.layers.3.mlp.down_proj.weight")
    assert weight.device.type == "cuda"
    assert weight.isfinite().all()
    assert float(weight.float().std()) == pytest.approx(0.02, rel=0.005)
    assert torch.equal(weight, source.read("model.layers.3.mlp.down_proj.weight"))
    gains = source.read("model.layers.3.input_layernorm.weight")
    assert int((gains > 1).sum()) == 4


@pytest.mark.parametrize("precision", ["awq", "awq:bits=3"])
def test_packed_values_are_as_on_a_cpu(precision: str) -> None:
    source = source_of("llama-3.2-1b", load_backend(precision))
    path = "model.layers.3.mlp.up_proj"
    packed = [source.read(f"{path}.{kind}").cpu() for kind in ("qweight", "qzeros", "scales")]
    num_codes = 8 if precision.endswith("3") else 16
    assert sorted(unpack(packed[0]).unique().tolist()) == list(range(num_codes))
    assert unpack(packed[1]).unique().tolist() == [num_codes // 2 - 1, num_codes // 2]
    weight = dequantize(*packed)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.005)
    assert abs(float(weight.mean())) < 1e-4


@pytest.mark.parametrize("preset", ["llama-3.1-8b", "qwen3-8b"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "nf4", "awq", "fp8"])
def test_an_8b_is_built_within_its_memory(preset: str, precision: str) -> None:
    """At most the finished weights, one 16-bit decoder layer and a GiB; `-s` prints the seconds."""
    backend = load_backend(precision)
    gc.collect()
    torch.cuda.empty_cache()
    devices.reset_memory_peak(CUDA)
    held = torch.cuda.memory_allocated(CUDA)
    began_s = time.monotonic()
    model = ModelInstance.load(source_of(preset, backend), backend, CUDA, max_context_tokens=2048)
    devices.synchronize(CUDA)
    seconds = time.monotonic() - began_s
    config = model.config
    width = config.num_heads * config.head_dim * 2 + config.num_kv_heads * config.head_dim * 2
    layer_bytes = 2 * config.hidden_size * (width + 3 * config.intermediate_size)
    peak = torch.cuda.max_memory_allocated(CUDA) - held
    print(
        f"{preset} {precision}: {seconds:.1f} s, {model.weight_bytes / 1e9:.2f} GB of weights, "
        f"peak {peak / 1e9:.2f} GB"
    )
    assert peak <= model.weight_bytes + layer_bytes + GIB


def test_a_saved_model_is_the_one_that_was_drawn(tmp_path: Path) -> None:
    source = source_of("llama-3.2-1b", load_backend("bf16"))
    save_random(source, source.path, tmp_path / "saved", lambda *_: None)
    saved = Checkpoint(tmp_path / "saved")
    assert sorted(saved.names) == sorted(source.names)
    assert all(torch.equal(saved.read(name), source.read(name).cpu()) for name in saved.names)
