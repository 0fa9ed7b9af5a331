"""Parameters of the rotary position embedding, out of config.json. No torch: a plan reads them too.

config --parse--> RopeConfig --> rotary.py, which makes the tables

Variants after `transformers`' modeling_rope_utils: default, linear (positions divided), llama3 (low
frequencies divided, high ones kept, a ramp between), yarn (arXiv 2309.00071). `dynamic` and `longrope`
are refused: their frequencies depend on the length of a batch, so a neighbour could change an answer.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from service.errors import CheckpointError

VARIANTS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Parameters of the rotary embedding; which of them count depends on `variant`."""

    variant: str
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float = 1.0  # yarn: scales cosines and sines
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions

    @classmethod
    def parse(cls, raw: dict[str, Any], default_theta: float, max_positions: int) -> Self:
        """config.json -> parameters, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
        given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(given, dict):
            raise _bad("rope_parameters", given, "an object")
        variant = given.get("rope_type", given.get("type", "default"))
        if variant not in VARIANTS:
            raise CheckpointError(
                f"rotary variant `{variant}` is not supported; supported are {', '.join(VARIANTS)}",
                hint="its frequencies depend on the length of the batch, so neighbours would change answers"
                if variant in ("dynamic", "longrope")
                else "serve a checkpoint with one of these variants",
            )
        partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise _bad("partial_rotary_factor", partial, "1: all of a head is rotated")
        theta = _number(given, "rope_theta", default=_number(raw, "rope_theta", default=default_theta))
        if variant == "default":
            return cls(variant, theta)
        if variant == "linear":
            return cls(variant, theta, _number(given, "factor"))
        original = raw.get("original_max_position_embeddings")
        if original is None:
            original = given.get("original_max_position_embeddings") or max_positions
        if type(original) is not int or not 0 < original <= 1 << 24:
            raise _bad("original_max_position_embeddings", original, "a positive integer")
        if variant == "llama3":
            low, high = _number(given, "low_freq_factor"), _number(given, "high_freq_factor")
            if high <= low:
                raise _bad("high_freq_factor", high, f"a number above low_freq_factor = {low}")
            return cls(variant, theta, _number(given, "factor"), original, low, high)
        factor = _number(given, "factor", default=max_positions / original)
        return cls(
            variant,
            theta,
            factor,
            original,
            beta_fast=_number(given, "beta_fast", default=32.0),
            beta_slow=_number(given, "beta_slow", default=1.0),
            attention_factor=_number(given, "attention_factor", default=_yarn_attention(given, factor)),
            truncate=bool(given.get("truncate", True)),
        )

    def max_context_tokens(self, max_positions: int) -> int:
        """Longest sequence the checkpoint means: yarn files may still state the length before stretching."""
        if self.variant != "yarn":
            return max_positions
        return max(max_positions, int(self.original_max_positions * self.factor))


def _yarn_attention(given: dict[str, Any], factor: float) -> float:
    """YaRN's temperature on attention, folded into the cosines and sines."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return scale(_number(given, "mscale")) / scale(_number(given, "mscale_all_dim"))
    return scale(1.0)


def _number(values: dict[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _bad(name, value, "a positive number")
    return float(value)


def _bad(name: str, value: Any, accepted: str) -> CheckpointError:
    return CheckpointError(
        f"config.json: rotary `{name}` is `{str(value)[:80]}`, accepted is {accepted}",
        hint="fetch the checkpoint again",
    )
