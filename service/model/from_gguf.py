"""GGUF of the Llama shape -> folder that transformers and our decoder read; numpy only, no torch.

demo.gguf --convert()--> config.json, generation_config.json, tokenizer.json, tokenizer_config.json,
                         model.safetensors

Weights are dequantized to float32 and rounded once, to bfloat16. Layouts: gguf's `constants.py` for names,
https://huggingface.co/docs/safetensors for the container.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from service.errors import CheckpointError
from service.model.folders import write_json

TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # of gguf's token types


def tensor_name(name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`."""
    *block, stem, kind = name.split(".")
    if stem not in TENSORS or kind != "weight":
        raise CheckpointError(f"tensor `{name}` is not part of the Llama shape")
    return f"model.layers.{block[1]}.{TENSORS[stem]}.weight" if block else f"{TENSORS[stem]}.weight"


def unpermute(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Rows of one head as pairs (x0, y0, x1, y1, ...) -> halves (x0, x1, ..., y0, y1, ...).

    llama.cpp rotates neighbouring rows, transformers rows half a head apart.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> bit patterns of the nearest bfloat16, ties to even; every value must be finite."""
    if not np.isfinite(x).all():
        raise CheckpointError("a weight is not finite")
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def convert(gguf: Path, folder: Path, progress: Callable[[int, int], None]) -> None:
    """Write the Hugging Face files of `gguf` into `folder`; `progress(done, total)` counts tensors."""
    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise CheckpointError(
            f"GGUF architecture `{fields['general.architecture']}` is not supported; accepted is `llama`"
        )
    config = model_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(fields))
    write_weights(reader, folder / "model.safetensors", config, progress)


def model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """GGUF metadata -> config.json of LlamaForCausalLM."""
    hidden_size, num_heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": num_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        # the field is float32: its shortest decimal form is what the authors wrote
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_scaling": None,
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "tie_word_embeddings": tied,
        "vocab_size": fields["llama.vocab_size"],
    }


def tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Vocabulary and merges -> byte-level BPE, split as the file's `tokenizer.ggml.pre` says."""
    if fields["tokenizer.ggml.model"] != "gpt2" or fields["tokenizer.ggml.pre"] != "smollm":
        raise CheckpointError(f"GGUF tokenizer `{fields['tokenizer.ggml.pre']}` is not supported")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # `smollm`: each digit stands alone before the byte-level split sees the text, so that the
    # spaces in front of a number keep together
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    bpe.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return bpe


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Special tokens by name, and the chat template."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return {
        "add_prefix_space": False,
        **{f"{name}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]] for name, key in names.items()},
        "chat_template": fields["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def write_weights(
    reader: GGUFReader, file: Path, config: dict[str, Any], progress: Callable[[int, int], None]
) -> None:
    """Tensors one at a time -> bfloat16 safetensors; needs memory for one tensor, not for all."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in reader.tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF names the fastest dimension first
        header[tensor_name(tensor.name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for done, tensor in enumerate(reader.tensors, 1):
            weight = dequantize(tensor.data, tensor.tensor_type)
            stem = tensor.name.split(".")[-2]
            if stem in heads:
                weight = unpermute(weight, heads[stem])
            output.write(to_bfloat16(weight).astype("<u2", copy=False).tobytes())
            progress(done, len(reader.tensors))
