"""What each op of a decode step takes, timed before anybody waits: for /metrics and /version.

startup --model, its KV cache, `--time-kernels`--> kernel_seconds --{op: {rows: seconds}}--> EngineInfo

While the engine serves nobody can look inside a step: a GPU replays it as one graph in which a kernel begins
before the one ahead of it has ended, a CPU as one call. So each op is timed alone, all layers' one behind the
other, so that each reads weights and keys of its own from memory as in a step. With everything that its
kernels take along: the norm or the gate before a linear, rotary embedding and cache before attention. What
overlaps in a step does not here, so that the sum of the ops is more than a step.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from service import device as devices
from service.kernels.greedy import greedy
from service.model.batch import BLOCK_TOKENS, PagedKV, position_batch
from service.model.decoder import Step
from service.model.instance import ModelInstance

ROWS = (1, 16)
CONTEXT_TOKENS = 256  # behind each row, or as many as the cache has for it
REPEATS = 7


@torch.inference_mode()
def kernel_seconds(model: ModelInstance, kv: PagedKV, max_rows: int) -> dict[str, dict[str, float]]:
    """Op -> rows of a decode step -> seconds of that op in all layers; `kv` is nobody's yet."""
    device = model.device
    pool = devices.graph_pool(device) if model.is_capturable else None
    found: dict[str, dict[str, float]] = {}
    for num_rows in sorted({min(rows, max_rows) for rows in ROWS}):
        for op, run in ops(model, kv, num_rows).items():
            found.setdefault(op, {})[str(num_rows)] = devices.median_s(device, run, REPEATS, pool)
    devices.release_cached(device)
    return found


def ops(model: ModelInstance, kv: PagedKV, num_rows: int) -> dict[str, Callable[[], Tensor]]:
    """As halftone_kernel_info names the layers; random rows, which hold no outliers for int8."""
    decoder, layers, eps = model.decoder, model.layers(), model.config.norm_eps
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.randn(num_rows, width, generator=generator).to(model.device, model.dtype)

    first = layers[0]
    hidden, delta = rows(model.config.hidden_size), rows(model.config.hidden_size)
    qkv, attended = rows(first.qkv_proj.group.out_features), rows(first.o_proj.group.in_features)
    gate_up = rows(first.gate_up_proj.group.out_features)
    logits = decoder.head(hidden)
    step = decode_step(model, kv, num_rows)
    return {
        "qkv_proj": lambda: [
            layer.qkv_proj.normed(hidden, delta, layer.input_norm, eps)[1] for layer in layers
        ][-1],
        "attention": lambda: [layer.attend(qkv, step) for layer in layers][-1],
        "o_proj": lambda: [layer.o_proj(attended) for layer in layers][-1],
        "gate_up_proj": lambda: [
            layer.gate_up_proj.normed(hidden, delta, layer.post_attention_norm, eps)[1] for layer in layers
        ][-1],
        "down_proj": lambda: [layer.down_proj.gated(gate_up) for layer in layers][-1],
        "lm_head": lambda: decoder.head(hidden),
        "sample": lambda: greedy(logits),
    }


def decode_step(model: ModelInstance, kv: PagedKV, num_rows: int) -> Step:
    """Rows with blocks of their own behind them, as far as the cache goes round; block 0 is nobody's."""
    positions = min(CONTEXT_TOKENS, model.decoder.cos.shape[0])
    num_blocks = min(-(-positions // BLOCK_TOKENS), kv.num_blocks - 1)
    position = min(positions, num_blocks * BLOCK_TOKENS) - 1
    blocks = [
        [1 + (row * num_blocks + place) % (kv.num_blocks - 1) for place in range(num_blocks)]
        for row in range(num_rows)
    ]
    batch = position_batch([[0] * (position + 1)] * num_rows, blocks, position, model.device)
    return model.decoder.prepare(batch, kv)
