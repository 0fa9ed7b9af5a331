"""config.json -> ModelConfig: the fields we use, checked, and what each family does differently, as data.

The checkpoint reads it first, so a folder that cannot be served fails here, before any weight is touched.
Field names and defaults follow `transformers`, which writes these files: version 4 wrote `rope_theta` and
`rope_scaling`, version 5 writes both as `rope_parameters`; either is read.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import CheckpointError
from service.model.rope import RopeConfig

MAX_LAYERS = 512
MAX_HIDDEN = 65_536
MAX_VOCAB = 1 << 20
MAX_CONTEXT_TOKENS = 1 << 24


@dataclass(frozen=True)
class Family:
    """What a model type fixes in code rather than in config.json; None: config.json says."""

    architecture: str
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    qk_norm: bool = False
    tied_head: bool = False  # when config.json is silent
    rope_theta: float = 10_000.0  # when config.json is silent
    sliding_window: int | None = None  # when config.json is silent
    window_needs_flag: bool = True  # `sliding_window` counts only under `use_sliding_window`
    no_rope_interval: int = 0  # every n-th layer has no rotary embedding, when config.json is silent


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM", qkv_bias=False, o_bias=False, sliding_window=4096, window_needs_flag=False
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, o_bias=False, sliding_window=4096),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, sliding_window=4096),
    "smollm3": Family("SmolLM3ForCausalLM", tied_head=True, rope_theta=2_000_000.0, no_rope_interval=4),
}
SUPPORTED = "Llama 2/3 and SmolLM2 (llama), Mistral, Qwen2/2.5 (qwen2), Qwen3 dense (qwen3), SmolLM3"


@dataclass(frozen=True)
class ModelConfig:
    """One decoder's shape. Tuples have one entry a layer."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context_tokens: int
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]  # tokens a query sees, itself included; 0: all
    rotary: tuple[bool, ...]  # False: a layer without positions (NoPE)
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """Folder with config.json -> (config, `quantization_config` or None); CheckpointError if unusable."""
    raw = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = [
        raw.get("eos_token_id"),
        read_json(generation).get("eos_token_id") if generation.exists() else None,
    ]
    quantization = raw.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise _bad("quantization_config", quantization, "an object")
    return parse_config(raw, eos), quantization


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"`{path}` cannot be read: {(error.strerror or 'unknown reason').lower()}",
            hint="a checkpoint is a folder with config.json, tokenizer.json and *.safetensors",
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"`{path}` is not JSON", hint="fetch the file again") from None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"`{path}` holds {type(value).__name__}, not an object", hint="fetch the file again"
        )
    return value


def parse_config(raw: dict[str, Any], eos: list[Any] | None = None) -> ModelConfig:
    """config.json's object -> ModelConfig."""
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    architectures = raw.get("architectures") or ([family.architecture] if family else [model_type])
    if family is None or architectures != [family.architecture]:
        raise CheckpointError(
            f"architecture `{', '.join(map(str, architectures))}` (model_type `{model_type}`) "
            "is not supported",
            hint=f"supported are {SUPPORTED}, as causal language models",
        )
    hidden_size = _integer(raw, "hidden_size", MAX_HIDDEN)
    num_layers = _integer(raw, "num_hidden_layers", MAX_LAYERS)
    num_heads = _integer(raw, "num_attention_heads", MAX_HIDDEN)
    num_kv_heads = _integer(raw, "num_key_value_heads", num_heads, default=num_heads)
    head_dim = _integer(
        raw, "head_dim", MAX_HIDDEN, default=_default_head_dim(family, hidden_size, num_heads)
    )
    vocab_size = _integer(raw, "vocab_size", MAX_VOCAB)
    if num_heads % num_kv_heads:
        raise _bad("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_heads}")
    if head_dim % 2 or head_dim * num_heads > MAX_HIDDEN:
        raise _bad("head_dim", head_dim, f"an even number, at most {MAX_HIDDEN // num_heads}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _bad("hidden_act", raw["hidden_act"], "`silu`")
    max_positions = _integer(raw, "max_position_embeddings", MAX_CONTEXT_TOKENS)
    rope = RopeConfig.parse(raw, family.rope_theta, max_positions)
    bias = _boolean(raw, "attention_bias", False)
    return ModelConfig(
        architecture=family.architecture,
        model_type=str(model_type),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=_integer(raw, "intermediate_size", 16 * MAX_HIDDEN),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=_epsilon(raw),
        max_context_tokens=rope.max_context_tokens(max_positions),
        tied_head=_boolean(raw, "tie_word_embeddings", family.tied_head),
        qkv_bias=bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=bias if family.o_bias is None else family.o_bias,
        mlp_bias=_boolean(raw, "mlp_bias", False),
        qk_norm=family.qk_norm,
        windows=_windows(raw, family, num_layers),
        rotary=_rotary(raw, family, num_layers),
        rope=rope,
        eos_token_ids=_eos(eos if eos is not None else [raw.get("eos_token_id")], vocab_size),
    )


def _default_head_dim(family: Family, hidden_size: int, num_heads: int) -> int:
    return 128 if family.qk_norm else max(hidden_size // num_heads, 1)


def _windows(raw: dict[str, Any], family: Family, num_layers: int) -> tuple[int, ...]:
    """Sliding window of each layer, 0 where there is none."""
    window = raw.get("sliding_window", family.sliding_window)
    flagged = not family.window_needs_flag or _boolean(raw, "use_sliding_window", False)
    if window is None or not flagged or family.architecture == "LlamaForCausalLM":
        return (0,) * num_layers
    window = _integer({"sliding_window": window}, "sliding_window", MAX_CONTEXT_TOKENS)
    if not family.window_needs_flag:
        return (window,) * num_layers
    if raw.get("layer_types") is not None:
        kinds = _per_layer(raw, "layer_types", num_layers)
        if not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise _bad("layer_types", kinds, "`full_attention` or `sliding_attention` for each layer")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if family.no_rope_interval:
        return tuple(0 if rotary else window for rotary in _rotary(raw, family, num_layers))
    first = _integer(raw, "max_window_layers", MAX_LAYERS, default=28, minimum=0)
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def _rotary(raw: dict[str, Any], family: Family, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer has a rotary embedding. `no_rope_layers` says 1 where it *has* one."""
    if not family.no_rope_interval:
        return (True,) * num_layers
    if raw.get("no_rope_layers") is not None:
        flags = _per_layer(raw, "no_rope_layers", num_layers)
        if not set(flags) <= {0, 1}:
            raise _bad("no_rope_layers", flags, "0 or 1 for each layer")
        return tuple(bool(flag) for flag in flags)
    interval = _integer(raw, "no_rope_layer_interval", MAX_LAYERS, default=family.no_rope_interval)
    return tuple((layer + 1) % interval != 0 for layer in range(num_layers))


def _per_layer(raw: dict[str, Any], name: str, num_layers: int) -> list[Any]:
    values = raw[name]
    if not isinstance(values, list) or len(values) < num_layers:
        raise _bad(name, values, f"a list with an entry for each of {num_layers} layers")
    return values[:num_layers]


def _eos(sources: list[Any], vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer, from config.json and generation_config.json, each once."""
    ids: dict[int, None] = {}
    for source in sources:
        for token in source if isinstance(source, list) else [] if source is None else [source]:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise _bad("eos_token_id", token, f"a token id under vocab_size = {vocab_size}")
            ids[token] = None
    return tuple(ids)


def _epsilon(raw: dict[str, Any]) -> float:
    value = raw.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _bad("rms_norm_eps", value, "a number from 0 to 1")
    return float(value)


def _integer(
    raw: dict[str, Any], name: str, maximum: int, *, default: int | None = None, minimum: int = 1
) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if type(value) is not int or not minimum <= value <= maximum:
        raise _bad(name, value, f"an integer from {minimum} to {maximum}")
    return value


def _boolean(raw: dict[str, Any], name: str, default: bool) -> bool:
    value = raw.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _bad(name, value, "true or false")
    return value


def _bad(name: str, value: Any, accepted: str) -> CheckpointError:
    shown = "NaN" if isinstance(value, float) and math.isnan(value) else str(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return CheckpointError(
        f"config.json: `{name}` is `{shown}`, accepted is {accepted}", hint="fetch the checkpoint again"
    )
