"""The memory ledger's parts, named once for /metrics, /version, reports, dashboards and plans.

engine/ledger, plan/ --{part: bytes}--> whoever shows memory; no torch here
bytes of a KV cache --kv_tokens_in, requests_in--> what they hold, for plans and reports alike

The parts of one engine are disjoint, and together they are what its process holds of the device: of a GPU's
memory, or, on a CPU, of the machine's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

BLOCK_TOKENS = 16  # requests hold a KV cache by whole blocks


@dataclass(frozen=True)
class Part:
    """One row of the ledger; what stands before the first dot of its name is its group."""

    name: str
    help: str


# from what a precision decides to what it leaves to the rest: a stack is drawn in this order
PARTS = (
    Part("weights.codes", "Quantized weights of the linears."),
    Part("weights.scales", "What their codes count: scales, or absmax with its nested scales."),
    Part("weights.zeros", "Which of their codes mean 0, where that is not the same for all."),
    Part("weights.codebooks", "Tables of what codes mean, one for all layers."),
    Part("weights.linear16", "Linears, or what is left of them, in 16 or 32 bits: `skip`, biases."),
    Part("weights.norms", "Gains of the norms."),
    Part("weights.embedding", "Embedding; it is the head too where the checkpoint ties them."),
    Part("weights.head", "lm_head, where it is a tensor of its own."),
    Part("tables.rotary", "Cosines and sines, a row for each position of the longest request."),
    Part("tables.requests", "State of the running requests: block tables, sampling, penalties."),
    Part("kv.used", "KV cache that requests hold now."),
    Part("kv.free", "KV cache set aside for requests to come; blocks kept for their prefix are here."),
    Part(
        "activations",
        "Most that steps took beside all that, as far as the allocator keeps it; on a CPU all that is kept.",
    ),
    Part("workspace", "Buffers of kernels: partial sums of ours, cuBLAS's workspace, a CPU's recordings."),
    Part("graphs", "Captured steps: their buffers, and what the driver holds of them."),
    Part(
        "allocator_slack",
        "Kept by a GPU's allocator beyond that: rounding, fragments.",
    ),
    Part("outside_torch", "Not tensors: CUDA context and kernels' code; on a CPU interpreter and libraries."),
)


def weight_bytes(parts: Mapping[str, int]) -> int:
    """Of all weights: what a precision is chosen for."""
    return group_bytes(parts, "weights")


def kv_bytes(parts: Mapping[str, int]) -> int:
    """Of the KV cache, used or not: what is reserved."""
    return group_bytes(parts, "kv")


def kv_tokens_in(num_bytes: float, token_bytes: float) -> int:
    """Tokens that requests can hold in so much memory; the engine's block 0, for padding, is beside it."""
    return max(int(num_bytes // (BLOCK_TOKENS * token_bytes)), 0) * BLOCK_TOKENS


def requests_in(kv_tokens: int, request_tokens: float) -> int:
    """Requests of `request_tokens`, prompt and answer, that so many tokens hold at once."""
    return kv_tokens // BLOCK_TOKENS // ceil(request_tokens / BLOCK_TOKENS)


def group_bytes(parts: Mapping[str, int], group: str) -> int:
    return sum(size for part, size in parts.items() if part.partition(".")[0] == group)
