"""Bytes of a model's weights, tables and KV cache, by ledger part, out of config.json alone. No torch.

ModelConfig, Precision --> plan/, engine/shortage; a test holds them to what a loaded model holds
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any, Literal

from service.model.config import ModelConfig
from service.model.layout import layer_groups
from service.precision import Precision
from service.precision.linear import LinearSpec
from service.precision.options import AWQOptions
from service.precision.sizes import choose_awq_group

Head = Literal["16bit", "int8"]
FLOAT_BYTES = 4
CODE_BYTES = {"int8": 1, "fp8": 1}  # of the KV cache, beside which lie scales
SCALE_BYTES = 2  # of a coded cache: bfloat16, one for K and one for V of each token and head


def for_model(precision: Precision, config: ModelConfig, group_size: int = 0) -> Precision:
    """The same mode with what depends on the model decided: AWQ's group, or that of a checkpoint in it.

    PrecisionError where no group divides the model's linears.
    """
    options = precision.options
    if not isinstance(options, AWQOptions):
        return precision
    group = group_size or choose_awq_group(all_linears(config), options.group)
    return replace(precision, options=options.model_copy(update={"group": group}))


def all_linears(config: ModelConfig) -> list[LinearSpec]:
    """Of one layer; all layers have the same shapes."""
    return [part for parts in layer_groups(config, 0).values() for part in parts]


def weight_parts(config: ModelConfig, precision: Precision, width: int, head: Head) -> dict[str, int]:
    """Part -> bytes, in a mode made `for_model`; `width`: bytes of an activation, and of what is not
    quantized. PrecisionError for shapes that the mode has no place for."""
    sizes: dict[str, int] = defaultdict(int)
    for name, parts in layer_groups(config, 0).items():
        for part, size in precision.sizes(name, parts, width).items():
            sizes[f"weights.{part}"] += config.num_layers * size
    if precision.codebook_bytes:
        sizes["weights.codebooks"] = precision.codebook_bytes
    gains = 2 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)
    sizes["weights.norms"] = width * (config.num_layers * gains + config.hidden_size)
    sizes["weights.embedding"] = width * config.vocab_size * config.hidden_size
    if head == "int8":
        sizes["weights.head"] = config.vocab_size * (config.hidden_size + width)
    elif not config.tied_head:
        sizes["weights.head"] = sizes["weights.embedding"]
    return dict(sizes)


def rotary_bytes(config: ModelConfig, positions: int) -> int:
    """Cosines and sines."""
    return 2 * FLOAT_BYTES * config.head_dim * positions


def kv_token_bytes(config: ModelConfig, kv_dtype: str, width: int) -> int:
    """K and V of one token in all layers; `kv_dtype`: of codes, or `auto`, that of activations."""
    heads = config.num_layers * config.num_kv_heads
    codes = CODE_BYTES.get(kv_dtype)
    if codes is None:
        return 2 * heads * config.head_dim * width
    return 2 * heads * (config.head_dim * codes + SCALE_BYTES)


def group_size_of(quantization: dict[str, Any] | None) -> int:
    """Weights under one scale of a checkpoint in AWQ; 0: it is in something else, or says none."""
    return int((quantization or {}).get("group_size", 0))
