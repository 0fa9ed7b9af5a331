"""A decoder of which one layer at a time is there: for what passes many tokens through a model once.

engine/streamed, quantize/calibration --config, read--> DecoderLayer, and a cache that every layer begins anew
"""

import torch

from service.kernels.int8_rows import Live
from service.model.batch import PagedKV
from service.model.config import ModelConfig
from service.model.decoder import DecoderLayer
from service.precision.base import Backend, Read


def build_layer(
    config: ModelConfig, index: int, backend: Backend, read: Read, device: torch.device, dtype: torch.dtype
) -> DecoderLayer:
    """As model/decoder builds it, for steps without padding."""
    return DecoderLayer(config, index, backend, read, device, dtype, False, Live())


def one_layer_cache(
    config: ModelConfig, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> PagedKV:
    """One layer's memory for all of them: each writes all that it reads."""
    kv = PagedKV(1, num_blocks, config.num_kv_heads, config.head_dim, dtype, device)
    kv.keys *= config.num_layers
    kv.values *= config.num_layers
    kv.scales *= config.num_layers
    return kv
