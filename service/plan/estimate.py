"""What an engine would hold of a device, by ledger part, and the KV tokens that this leaves room for.

ModelConfig, Precision, Device, Serving --estimate--> Estimate

Weights, tables and KV cache are counted as the engine counts them. What steps take, and what lies outside of
torch, are allowances for one GPU: a test there holds the sum to the ledger's. As the engine does, a plan
gives the KV cache a share of what is free once everything else is there.
"""

from dataclasses import dataclass

from service.ledger import BLOCK_TOKENS, PARTS, kv_bytes, kv_tokens_in
from service.model.config import ModelConfig
from service.model.sizes import Head, kv_token_bytes, rotary_bytes, weight_parts
from service.plan.devices import Device
from service.precision import Precision

MB = 1_000_000
STATE_WORDS, STATE_EXTRA_WORDS = 12, 1  # int32 of a request's row, besides its block table
FACTOR_BYTES, BIAS_BYTES = 16, 300 * (8 + 4)  # of a row's penalties, besides a count of each token
# allowances: for a CUDA context and the code of kernels, 792 to 794 MB on an H100 in five precisions; on a
# CPU for interpreter, torch and its libraries, which take 270 to 360 MB by precision
OUTSIDE_BYTES, CPU_OUTSIDE_BYTES = 790 * MB, 310 * MB
WORKSPACE_BYTES = 45 * MB  # cuBLAS's 32 MiB on an H100, partial sums of ours
ROUNDING_BYTES = 1 << 20  # of a large tensor, on average: the allocator takes 2 MiB at a time
GRAPH_WORKSPACE_BYTES = 20 * MB  # cuBLAS's again, 32 MiB where it multiplies
GRAPH_NODE_BYTES = 8_000  # of the driver's, for each kernel of a captured step
GRAPH_KERNELS_OF_LAYER = 9
GRAPHS_OF_SIZE = 2  # greedy and drawn
GRAPH_ROWS = 2048  # of the largest captured step with prompts


@dataclass(frozen=True)
class Serving:
    """How the server would be started, as far as memory depends on it."""

    max_batch_requests: int
    step_tokens: int  # most of one step
    kv_memory_fraction: float
    head: Head = "16bit"
    kv_tokens: int = 0  # 0: as many as the fraction allows
    max_context_tokens: int = 0  # 0: what the model allows


@dataclass(frozen=True)
class Estimate:
    parts: dict[str, int]
    kv_token_bytes: int
    kv_tokens: int  # 0: the device has no room for any

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def fixed_bytes(self) -> int:
        """Of everything but the KV cache."""
        return self.total_bytes - kv_bytes(self.parts)


def estimate(
    config: ModelConfig, precision: Precision, kv_dtype: str, device: Device, serving: Serving
) -> Estimate:
    """`precision` made `for_model`. PrecisionError for shapes that the mode has no place for."""
    width = 4 if precision.name == "fp32" else 2
    positions = serving.max_context_tokens or config.max_context_tokens
    token_bytes = kv_token_bytes(config, kv_dtype, width)
    parts = weight_parts(config, precision, width, serving.head)
    parts["tables.rotary"] = rotary_bytes(config, positions)
    parts |= (
        gpu_parts(config, precision.name, width, token_bytes, serving)
        if device.is_gpu
        else {"outside_torch": CPU_OUTSIDE_BYTES}
    )
    block_bytes = BLOCK_TOKENS * token_bytes
    # the rows of requests are made behind the cache, so they are no part of what it leaves
    free = device.memory_bytes - sum(parts.values())
    if serving.kv_tokens:
        blocks = -(-serving.kv_tokens // BLOCK_TOKENS)
    else:
        blocks = kv_tokens_in(int(free * serving.kv_memory_fraction), token_bytes) // BLOCK_TOKENS
    fits = blocks >= 2 and blocks * block_bytes <= free
    kv_tokens = blocks * BLOCK_TOKENS if fits else 0
    context_tokens = min(positions, kv_tokens or positions)
    parts["tables.requests"] = request_bytes(config, serving.max_batch_requests, context_tokens)
    parts["kv.free"] = (blocks + 1) * block_bytes if fits else 0  # block 0 is padding's
    known = {part.name for part in PARTS}
    assert parts.keys() <= known, parts.keys() - known
    return Estimate({part.name: parts.get(part.name, 0) for part in PARTS}, token_bytes, kv_tokens)


def gpu_parts(
    config: ModelConfig, precision: str, width: int, token_bytes: int, serving: Serving
) -> dict[str, int]:
    """What steps, kernels, captured graphs and the driver take."""
    hidden, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    # gate, up and their product; residual stream, norm and sum, q and attention
    row = width * (3 * inner + 6 * hidden)
    if precision == "int8":
        row += inner + hidden  # codes beside the rows that they are of, which outliers are taken from
    requests = serving.max_batch_requests
    sizes = len({size for size in (1, 2, 4, *range(8, requests, 8)) if size < requests} | {requests})
    kernels = sizes * GRAPHS_OF_SIZE * config.num_layers * GRAPH_KERNELS_OF_LAYER
    logits = requests * vocabulary
    return {
        "activations": max(serving.step_tokens * row, logits * width),
        "workspace": WORKSPACE_BYTES,
        # the largest captured step, and logits of all requests in float32
        "graphs": max(min(serving.step_tokens, GRAPH_ROWS) * row, logits * width)
        + logits * 4
        + GRAPH_WORKSPACE_BYTES
        + kernels * GRAPH_NODE_BYTES,
        # the cache of the first steps is too small for anything of the real one; K, V and four linears of
        # each layer are rounded up
        "allocator_slack": serving.step_tokens * token_bytes + 6 * config.num_layers * ROUNDING_BYTES,
        "outside_torch": OUTSIDE_BYTES,
    }


def request_bytes(config: ModelConfig, max_batch_requests: int, context_tokens: int) -> int:
    """Rows of the running requests, and one of padding: state, block table, penalties."""
    blocks = -(-context_tokens // BLOCK_TOKENS)
    state = 4 * (STATE_WORDS + STATE_EXTRA_WORDS + blocks)
    return (max_batch_requests + 1) * (state + 4 * config.vocab_size + FACTOR_BYTES + BIAS_BYTES)
