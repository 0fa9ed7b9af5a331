"""config.json -> the linears of each layer and the tensors of a checkpoint, by name and shape. No torch.

config --ModelConfig--> layer_groups, expected_tensors --> decoder, verify, random_weights, plan/
"""

from service.model.config import ModelConfig
from service.precision.linear import LinearSpec


def layer_groups(config: ModelConfig, layer: int) -> dict[str, tuple[LinearSpec, ...]]:
    """Layer class -> the linears built into it, in the order of their outputs."""
    prefix = f"model.layers.{layer}"
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    return {
        "qkv_proj": (
            LinearSpec(f"{attention}.q_proj", hidden, queries, config.qkv_bias),
            LinearSpec(f"{attention}.k_proj", hidden, keys, config.qkv_bias),
            LinearSpec(f"{attention}.v_proj", hidden, keys, config.qkv_bias),
        ),
        "o_proj": (LinearSpec(f"{attention}.o_proj", queries, hidden, config.o_bias),),
        "gate_up_proj": (
            LinearSpec(f"{mlp}.gate_proj", hidden, inner, config.mlp_bias),
            LinearSpec(f"{mlp}.up_proj", hidden, inner, config.mlp_bias),
        ),
        "down_proj": (LinearSpec(f"{mlp}.down_proj", inner, hidden, config.mlp_bias),),
    }


def expected_tensors(config: ModelConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """-> (tensors outside the linears, tensors of the linears), each name -> shape."""
    hidden = config.hidden_size
    plain: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    linear: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        plain[f"{prefix}.input_layernorm.weight"] = (hidden,)
        plain[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            plain[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            plain[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        for parts in layer_groups(config, layer).values():
            for part in parts:
                linear[f"{part.path}.weight"] = (part.out_features, part.in_features)
                if part.bias:
                    linear[f"{part.path}.bias"] = (part.out_features,)
    plain["model.norm.weight"] = (hidden,)
    if not config.tied_head:
        plain["lm_head.weight"] = (config.vocab_size, hidden)
    return plain, linear
