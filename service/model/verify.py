"""Is this folder exactly the model that its config.json describes? Asked before anything is loaded.

Headers only, so it takes milliseconds. Every linear of a pre-quantized checkpoint is left to its precision
backend, which knows the packing; everything else must be there, once, in the right shape and type.
"""

import re
from pathlib import Path
from typing import Any

import torch

from service.errors import CheckpointError
from service.model.checkpoint import TensorSource
from service.model.config import read_json
from service.model.layout import expected_tensors

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# buffers that older releases of transformers saved and that follow from config.json
HARMLESS = re.compile(r"(.*\.)?rotary_emb\.inv_freq|.*\.self_attn\.(bias|masked_bias)")


def verify(checkpoint: TensorSource, tokenizer: Path | None = None) -> None:
    """CheckpointError naming tensor, expected and found; returns if there is nothing to say.

    `tokenizer` is a folder with tokenizer.json; None: the checkpoint's.
    """
    config = checkpoint.config
    plain, linear = expected_tensors(config)
    quantized = checkpoint.quantization is not None
    for name, shape in (plain if quantized else plain | linear).items():
        _check(checkpoint, name, shape)
    allowed = plain | linear
    paths = tuple({name.rpartition(".")[0] + "." for name in linear}) if quantized else ()
    for name in checkpoint.names:
        if name in allowed or name.startswith(paths) or HARMLESS.fullmatch(name):
            continue
        if name == "lm_head.weight" and config.tied_head:
            _check(checkpoint, name, (config.vocab_size, config.hidden_size))
            continue
        raise CheckpointError(
            f"tensor `{name}`: expected none of this name, found shape {_shape(checkpoint.info(name).shape)}",
            hint=f"config.json describes {config.num_layers} layers of {config.architecture}; "
            "it and the weights must come from the same checkpoint",
        )
    if quantized:
        present = {name.rpartition(".")[0] for name in checkpoint.names}
        for path in (name.removesuffix(".weight") for name in linear if name.endswith(".weight")):
            if path not in present:
                raise CheckpointError(
                    f"linear `{path}`: expected its quantized tensors, found none",
                    hint="fetch the checkpoint again: a file is missing",
                )
    verify_tokenizer(tokenizer or checkpoint.path, config.vocab_size)


def _check(checkpoint: TensorSource, name: str, shape: tuple[int, ...]) -> None:
    if name not in checkpoint:
        raise CheckpointError(
            f"tensor `{name}`: expected shape {_shape(shape)}, found nothing",
            hint="fetch the checkpoint again: config.json and the weights do not match",
        )
    info = checkpoint.info(name)
    if info.shape != shape:
        raise CheckpointError(
            f"tensor `{name}` in `{info.file}`: expected shape {_shape(shape)}, found {_shape(info.shape)}",
            hint="config.json and the weights must come from the same checkpoint",
        )
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"tensor `{name}` in `{info.file}`: expected float32, float16 or bfloat16, "
            f"found {str(info.dtype).removeprefix('torch.')}",
            hint="a quantized checkpoint needs its `quantization_config` in config.json"
            if checkpoint.quantization is None
            else "fetch the checkpoint again",
        )


def verify_tokenizer(folder: Path, vocab_size: int) -> None:
    """Every id that tokenizer.json can produce has a row in the embedding."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    tokenizer = read_json(path)
    model = tokenizer.get("model")
    vocab: Any = model.get("vocab") if isinstance(model, dict) else None
    ids: list[Any] = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab or ())))
    added = tokenizer.get("added_tokens") or []
    ids += [entry.get("id") for entry in added if isinstance(entry, dict)]
    if not ids or not all(type(token) is int for token in ids):
        raise CheckpointError(f"`{path}`: expected token ids, found none", hint="fetch the file again")
    if max(ids) >= vocab_size or min(ids) < 0:
        raise CheckpointError(
            f"`{path}`: expected token ids under vocab_size = {vocab_size}, found {max(ids)}",
            hint="tokenizer and weights must come from the same checkpoint",
        )


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
