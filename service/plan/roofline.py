"""The most that a device could do: a decode step reads all weights and all K and V once, and multiplies.

Estimate, Device --> tokens/s that no server can exceed; what one reaches is for `compare` to measure
"""

from dataclasses import dataclass

from service.model.config import ModelConfig
from service.model.sizes import all_linears
from service.plan.devices import Arithmetic, Device
from service.plan.estimate import Estimate
from service.precision.sizes import weights

OPERATIONS = 2  # of a weight and a row: multiply and add
EIGHT_BIT = ("int8", "fp8")  # precisions that multiply 8-bit operands


@dataclass(frozen=True)
class Roofline:
    """Bounds at so many requests of so many tokens each; 0 where the device's figures are not known."""

    decode_tokens_per_s: float
    one_request_tokens_per_s: float
    prefill_s: float  # of one request's context
    bound_by: str  # bandwidth, arithmetic, or empty


def roofline(
    config: ModelConfig, precision: str, found: Estimate, device: Device, requests: int, context_tokens: int
) -> Roofline:
    """Each request holds `context_tokens`, its prompt and all of its answer."""
    if not device.bandwidth or not found.kv_tokens:
        return Roofline(0.0, 0.0, 0.0, "")
    kind: Arithmetic = "fp32" if precision == "fp32" else "8bit" if precision in EIGHT_BIT else "16bit"
    per_s = device.flops.get(kind, 0.0)
    num_weights = config.num_layers * weights(all_linears(config))
    head = config.vocab_size * config.hidden_size
    token_pairs = OPERATIONS * 2 * config.num_layers * config.num_heads * config.head_dim

    def step(rows: int) -> tuple[float, float]:
        """Seconds of reading and of multiplying."""
        reading = (read_bytes(found.parts) + rows * context_tokens * found.kv_token_bytes) / device.bandwidth
        operations = rows * (OPERATIONS * (num_weights + head) + token_pairs * context_tokens)
        return reading, operations / per_s if per_s else 0.0

    requests = max(requests, 1)
    reading, multiplying = step(requests)
    # a prompt's queries see half of its keys, and one row of the head is wanted
    prefill = context_tokens * (OPERATIONS * num_weights + token_pairs * context_tokens / 2)
    return Roofline(
        requests / max(reading, multiplying),
        1 / max(step(1)),
        max(prefill / per_s, read_bytes(found.parts) / device.bandwidth) if per_s else 0.0,
        "bandwidth" if reading >= multiplying else "arithmetic",
    )


def read_bytes(parts: dict[str, int]) -> int:
    """Weights that a step reads: all but an embedding that is not the head too."""
    linears = sum(size for part, size in parts.items() if part.startswith("weights."))
    return linears - (parts["weights.embedding"] if parts["weights.head"] else 0)
