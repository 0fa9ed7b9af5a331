"""Rotary position embedding: its parameters -> a table of cosines and sines, one row a position.

rope.RopeConfig --rotary_table--> decoder. Formulas after `transformers`' modeling_rope_utils.
"""

import math

import torch
from torch import Tensor

from service.model.rope import RopeConfig


def rotary_table(
    rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """-> cosines and sines, each float32 [num_positions, head_dim].

    The first half of the sines is negated: rotating a head is then `x * cos + swap_halves(x) * sin`.
    """
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    return torch.cat((cos, cos), -1).to(device), torch.cat((-sin, sin), -1).to(device)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """-> float32 [head_dim / 2], radians a position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.variant == "linear":
        return base / rope.factor
    if rope.variant == "llama3":
        return _llama3(rope, base)
    if rope.variant == "yarn":
        return _yarn(rope, head_dim)
    return base


def _llama3(rope: RopeConfig, base: Tensor) -> Tensor:
    wavelength = 2 * math.pi / base
    longest_kept = rope.original_max_positions / rope.high_freq_factor
    shortest_divided = rope.original_max_positions / rope.low_freq_factor
    ramp = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - ramp) * base / rope.factor + ramp * base
    result = torch.where(wavelength > shortest_divided, base / rope.factor, base)
    middle = (wavelength >= longest_kept) & (wavelength <= shortest_divided)
    return torch.where(middle, between, result)


def _yarn(rope: RopeConfig, head_dim: int) -> Tensor:
    """Frequencies that turn more than `beta_fast` times are kept, fewer than `beta_slow` divided."""

    def dimension(turns: float) -> float:
        positions_a_turn = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(positions_a_turn) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    keep = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep
