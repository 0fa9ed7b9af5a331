"""How large the KV cache is: what was asked for, or what the device has left, shared with engines to come.

startup --EngineConfig, loaded model--> make_kv, context_tokens --> PagedKV, the longest request
"""

import torch

from service import device as devices
from service.engine.dtypes import DTYPE_NAMES, DTYPES
from service.engine.shortage import MIB, told_shortage, weight_bytes
from service.engine.sources import choose_backend, open_source
from service.errors import SettingError, ShortageError
from service.messages import EngineConfig
from service.model.batch import BLOCK_TOKENS, PagedKV
from service.model.instance import ModelInstance

CPU_KV_TOKENS = 16384  # where the user did not say; memory is the users' own there
PROCESS_BYTES = 2 << 30  # of a GPU, of an engine beside its weights: driver's context, graphs, activations


def num_kv_blocks(config: EngineConfig, model: ModelInstance, graph_bytes: int) -> int:
    """Blocks that requests can hold, by `kv_tokens` or by the memory that is free now, less the graphs'.

    Engines that will load onto the device after this one have room for their weights, and each an equal
    share of the rest.
    """
    free = devices.memory_free_bytes(model.device) - graph_bytes - beside_bytes(config, model.device)
    block_bytes = model.kv_block_bytes
    if config.kv_tokens:
        wanted = -(-config.kv_tokens // BLOCK_TOKENS)
        if wanted * block_bytes > free:
            held = devices.memory_used_bytes(model.device)
            raise ShortageError(
                f"setting `kv_tokens` = `{config.kv_tokens}` needs {wanted * block_bytes // MIB} MiB on "
                f"`{model.device}`, {free // MIB} MiB are free",
                hint=f"at most {free // block_bytes * BLOCK_TOKENS} tokens fit now",
                needs_bytes=held + wanted * block_bytes,
                has_bytes=held + max(free, 0),
            )
        return wanted
    blocks = int(free * config.kv_memory_fraction) // (1 + len(config.beside)) // block_bytes
    if model.device.type != "cuda":
        blocks = min(blocks, CPU_KV_TOKENS // BLOCK_TOKENS)
    if blocks < 2:
        raise ShortageError(
            f"no memory is left for the KV cache on `{model.device}`: {free // MIB} MiB are free, "
            f"{BLOCK_TOKENS} tokens need {block_bytes / MIB:.1f} MiB",
            hint="free memory, or choose a smaller model or precision",
        )
    return blocks


def beside_bytes(config: EngineConfig, device: torch.device) -> int:
    """What the engines that load after this one take before they have a KV cache."""
    total = 0
    for precision in config.beside:
        source = open_source(config, device)
        backend = choose_backend(precision, source, device)
        dtype = DTYPES.get(config.dtype) or backend.activation_dtype(device, source.dtype)
        total += weight_bytes(source, backend, dtype, config.head)
        if device.type == "cuda":
            total += PROCESS_BYTES
    return total


def make_kv(config: EngineConfig, model: ModelInstance, graph_bytes: int) -> PagedKV:
    """The cache that requests share, and block 0 beside it."""
    num_blocks = num_kv_blocks(config, model, graph_bytes)
    told = f"a KV cache of {num_blocks * BLOCK_TOKENS} tokens in {DTYPE_NAMES[model.kv_dtype]}"
    with told_shortage(model.device, told, lambda: (num_blocks + 1) * model.kv_block_bytes):
        kv = model.new_kv(num_blocks + 1)
        for tensor in kv.tensors:
            tensor.zero_()  # makes a CPU's pages resident now, so that memory is what the ledger says
    return kv


def context_tokens(config: EngineConfig, model: ModelInstance, kv: PagedKV) -> int:
    """Longest prompt and answer: what was asked, what the model allows, what the cache can hold."""
    room = (kv.num_blocks - 1) * BLOCK_TOKENS
    if not config.max_context_tokens:
        return min(model.config.max_context_tokens, room)
    limit, reason = min((model.config.max_context_tokens, "the model allows"), (room, "the KV cache holds"))
    if config.max_context_tokens > limit:
        raise SettingError(
            f"setting `max_context_tokens` = `{config.max_context_tokens}`: {reason} {limit}",
            hint=f"at most {limit}" + (", or raise `kv_tokens`" if limit == room else ""),
        )
    return config.max_context_tokens
