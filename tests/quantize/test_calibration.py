"""What a layer's inputs are, a layer at a time: those of the whole model, and no layer outlives its turn."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from service.model.checkpoint import Checkpoint
from service.model.decoder import DecoderLayer
from service.quantize.calibration import InputStatistics, observe_layers, windows_batch
from tests.tiny_models import load_instance, make_checkpoint

CPU = torch.device("cpu")
WINDOWS = [[(7 * i + 3 * w) % 128 for i in range(20 + 17 * w)] for w in range(4)]
FAMILIES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 24},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    """Bit for bit, each window seeing itself alone."""
    make_checkpoint(tmp_path, family if family != "tied" else "llama", torch.bfloat16, **FAMILIES[family])
    seen: dict[str, Tensor] = {}
    whole = load_instance(tmp_path, "bf16")
    batch, num_blocks = windows_batch(WINDOWS, CPU)
    whole.forward(batch, whole.new_kv(num_blocks), lambda path, x: seen.update({path: x.clone()}))
    source = Checkpoint(tmp_path)
    layers = list(observe_layers(source, source.read, WINDOWS, CPU))
    assert [layer.index for layer in layers] == [0, 1, 2]
    firsts = {"qkv_proj": "self_attn.q_proj", "o_proj": "self_attn.o_proj"}
    firsts |= {"gate_up_proj": "mlp.gate_proj", "down_proj": "mlp.down_proj"}
    for layer in layers:
        assert set(layer.inputs) == set(firsts)
        for name, path in firsts.items():
            wanted = InputStatistics.of(seen[f"model.layers.{layer.index}.{path}"])
            assert layer.inputs[name].gram.equal(wanted.gram)
            assert layer.inputs[name].mean_abs.equal(wanted.mean_abs)
        assert {name.split(".")[2] for name in layer.tensors} == {str(layer.index)}
        assert all(tensor.equal(source.read(name)) for name, tensor in layer.tensors.items())


def test_one_layer_lives_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was built of it nor what was read and observed for it."""
    make_checkpoint(tmp_path, "llama", torch.bfloat16, num_hidden_layers=5)
    built: weakref.WeakSet[DecoderLayer] = weakref.WeakSet()
    read: list[weakref.ref[Tensor]] = []
    source, init = Checkpoint(tmp_path), DecoderLayer.__init__

    def build(self: DecoderLayer, *arguments: object) -> None:
        assert not built
        built.add(self)
        init(self, *arguments)  # type: ignore[arg-type]

    def read_and_watch(name: str) -> Tensor:
        if name.endswith("input_layernorm.weight"):
            assert not any(tensor() is not None for tensor in read)
        tensor = source.read(name)
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(DecoderLayer, "__init__", build)
    moments: list[weakref.ref[InputStatistics]] = []
    for layer in observe_layers(source, read_and_watch, WINDOWS, CPU):
        assert not any(each() is not None for each in moments)
        assert not built
        moments += map(weakref.ref, layer.inputs.values())
        del layer
    assert len(moments) == 5 * 4
