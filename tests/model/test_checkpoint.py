"""A damaged checkpoint is refused by name before it is served; a sound one in any file layout is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from service.errors import CheckpointError, PrecisionError
from service.model.checkpoint import Checkpoint
from service.model.verify import verify
from tests.tiny_models import load_instance, logits_of, make_checkpoint


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_checkpoint(folder, "qwen3", dtype=torch.bfloat16, head_dim=16)
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 126}}, "added_tokens": [{"id": 127}]})
    )
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def open_and_read(folder: Path) -> None:
    """All that loading would touch."""
    checkpoint = Checkpoint(folder)
    verify(checkpoint)
    for name in checkpoint.names:
        checkpoint.read(name)


LAYER = "model.layers.1"
TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(f"{LAYER}.self_attn.k_proj.weight"), f"{LAYER}.self_attn.k_proj.weight"),
    "missing-norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "missing-head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    "extra": (lambda t: t.update({"model.extra": torch.ones(3)}), "model.extra"),
    "extra-bias": (
        lambda t: t.update({f"{LAYER}.mlp.up_proj.bias": torch.ones(96).bfloat16()}),
        f"{LAYER}.mlp.up_proj.bias",
    ),
    "transposed": (
        lambda t: t.update(
            {f"{LAYER}.mlp.up_proj.weight": t[f"{LAYER}.mlp.up_proj.weight"].t().contiguous()}
        ),
        "expected shape 96x64, found 64x96",
    ),
    "short-vocabulary": (
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].clone()}),
        "expected shape 128x64, found 100x64",
    ),
    "integers-for-floats": (
        lambda t: t.update(
            {f"{LAYER}.self_attn.q_norm.weight": torch.ones(16, dtype=torch.int8)},
        ),
        "expected float32, float16 or bfloat16, found int8",
    ),
    "double-precision": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}),
        "found float64",
    ),
    "nan": (lambda t: t[f"{LAYER}.mlp.down_proj.weight"].view(-1)[7].fill_(torch.nan), "found 1 NaN"),
    "infinity": (lambda t: t["model.norm.weight"][3:5].fill_(-torch.inf), "found 2 NaN or infinite"),
    "opposite-infinities": (
        lambda t: t["model.norm.weight"][3:5].copy_(torch.tensor([torch.inf, -torch.inf])),
        "found 2 NaN or infinite",
    ),
}
CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "too-many-layers": ({"num_hidden_layers": 3000}, "num_hidden_layers"),
    "layers-cut": ({"num_hidden_layers": 1, "layer_types": None}, "model.layers.1"),
    "layers-added": ({"num_hidden_layers": 4, "layer_types": None}, "model.layers.3"),
    "zero-heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads-do-not-share": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "odd-head": ({"head_dim": 15}, "head_dim"),
    "huge-vocabulary": ({"vocab_size": 1 << 30}, "vocab_size"),
    "fractional-size": ({"hidden_size": 64.5}, "hidden_size"),
    "boolean-size": ({"intermediate_size": True}, "intermediate_size"),
    "nan-epsilon": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "text-rope": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta"),
    "dynamic-rope": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "partial-rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "other-activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "eos-outside": ({"eos_token_id": [2, 128]}, "eos_token_id"),
    "other-model": ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
    "other-task": ({"architectures": ["Qwen3ForSequenceClassification"]}, "SequenceClassification"),
    "quantization-not-object": ({"quantization_config": "awq"}, "quantization_config"),
}


def test_sound_checkpoint_passes(sound: Path) -> None:
    open_and_read(sound)


@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_tensor_fault_is_named(folder: Path, fault: str) -> None:
    change, named = TENSOR_FAULTS[fault]
    change_tensors(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_and_read(folder)
    assert named in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_config_fault_is_named(folder: Path, fault: str) -> None:
    changes, named = CONFIG_FAULTS[fault]
    change_config(folder, **changes)
    with pytest.raises(CheckpointError) as caught:
        open_and_read(folder)
    assert named in caught.value.message
    assert caught.value.hint


def test_unsupported_architecture_lists_the_supported(folder: Path) -> None:
    change_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"):
        assert family in caught.value.hint


FILE_FAULTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda data: data[: len(data) // 2], "not a whole safetensors file"),
    "empty": (lambda data: b"", "not a whole safetensors file"),
    "trailing-bytes": (lambda data: data + b"x", "not a whole safetensors file"),
    "huge-header": (lambda data: (1 << 62).to_bytes(8, "little") + data[8:], "not a whole safetensors file"),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_broken_file_is_named(folder: Path, fault: str) -> None:
    damage, named = FILE_FAULTS[fault]
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        open_and_read(folder)
    assert named in caught.value.message


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000], ids=["empty", "list", "cut", "bytes", "deep"]
)
def test_config_that_is_no_object(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(folder)


def test_missing_folder_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)


def test_tokenizer_ids_outside_the_embedding(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 128}}}))
    with pytest.raises(CheckpointError, match="vocab_size = 128, found 128"):
        open_and_read(folder)


def test_pickled_weights_are_refused_with_the_fix(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        Checkpoint(folder)
    assert "save_pretrained" in caught.value.hint


def shard(folder: Path) -> dict[str, str]:
    """Split the one file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = [dict(list(tensors.items())[number::2]) for number in range(2)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, folder / file)
    weight_map = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_read_as_one(sound: Path, folder: Path) -> None:
    shard(folder)
    open_and_read(folder)
    whole, parts = Checkpoint(sound), Checkpoint(folder)
    assert sorted(whole.names) == sorted(parts.names)
    assert all(torch.equal(whole.read(name), parts.read(name)) for name in whole.names)
    assert whole.num_parameters == parts.num_parameters == sum(whole.read(n).numel() for n in whole.names)


def test_shard_faults(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, {**weight_map, "model.norm.weight": "../copy/model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"names `\.\./copy"):
        Checkpoint(folder)
    write_index(folder, {})
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint(folder)
    write_index(folder, weight_map)
    save_file({"model.norm.weight": torch.ones(64)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError):
        open_and_read(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not in"):
        Checkpoint(folder)


def test_buffers_of_older_releases_are_harmless(folder: Path) -> None:
    change_tensors(
        folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    open_and_read(folder)


def test_quantized_linears_are_left_to_their_backend(folder: Path) -> None:
    """Packed tensors under a linear's name pass; a linear with no tensor at all does not."""

    def pack(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{LAYER}.mlp.up_proj.weight"]
        tensors[f"{LAYER}.mlp.up_proj.qweight"] = torch.zeros(64, 12, dtype=torch.int32)

    change_tensors(folder, pack)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight"):
        open_and_read(folder)
    change_config(folder, quantization_config={"quant_method": "awq"})
    open_and_read(folder)
    change_tensors(folder, lambda t: t.pop(f"{LAYER}.mlp.up_proj.qweight"))
    with pytest.raises(CheckpointError, match=r"up_proj.*found none"):
        open_and_read(folder)


def test_backend_that_cannot_read_a_quantized_checkpoint(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(PrecisionError, match="awq"):
        load_instance(folder)


def test_generation_config_adds_its_eos_ids(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    assert Checkpoint(folder).config.eos_token_ids == (2, 5)


def test_rotary_parameters_of_older_releases(tmp_path: Path) -> None:
    """Version 4 of transformers wrote `rope_theta` and `rope_scaling` with `type`."""
    scaling = {"factor": 4.0, "original_max_position_embeddings": 64}
    new, old = tmp_path / "new", tmp_path / "old"
    make_checkpoint(new, "qwen2", rope_parameters={"rope_type": "yarn", "rope_theta": 5000.0, **scaling})
    shutil.copytree(new, old)
    change_config(old, rope_parameters=None, rope_theta=5000.0, rope_scaling={"type": "yarn", **scaling})
    assert Checkpoint(old).config == Checkpoint(new).config
    tokens = list(range(3, 120))
    assert torch.equal(logits_of(load_instance(old), tokens), logits_of(load_instance(new), tokens))
