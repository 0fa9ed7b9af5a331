"""How weights become codes of three bits, by torch: the best of a few clippings of each group's range."""

from typing import Any

import torch
from torch import Tensor

LARGEST = 7  # code, and zero
# shares of a group's range that the codes may span: what lies beyond is clipped, what lies inside is finer
WHOLE, LEAST = 20, 13  # in twentieths
CLIPPINGS = tuple(kept / WHOLE for kept in range(WHOLE, LEAST - 1, -1))
# of what a clipping leaves over, summed: squares clip more and read worse than no clipping (docs/quality.md)
ERROR_POWER = 6
WEIGHTS_AT_ONCE = 1 << 22  # whose errors are compared at once: 16 MiB in float32


def round_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `int3_round.round_groups`, some rows at a time."""
    rows = max(1, WEIGHTS_AT_ONCE // weight.shape[1])
    found = [round_rows(piece.float(), group_size) for piece in weight.split(rows)]
    codes, zeros, scales = (torch.cat(kind) for kind in zip(*found, strict=True))
    return codes, zeros, scales


def round_rows(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    grouped = weight.unflatten(1, (-1, group_size))  # [out, groups, group]
    low = grouped.amin(-1, keepdim=True).clamp(max=0)
    high = grouped.amax(-1, keepdim=True).clamp(min=0)
    span = torch.where(high == low, 1.0, high - low)
    best: list[Tensor] = []
    least: Any = None
    for clipping in CLIPPINGS:
        scale = ((high - low) * clipping / LARGEST).half().float()
        scale = torch.where(scale == 0, 1.0, scale)
        zero = (-low * clipping / scale).round().clamp(0, LARGEST)
        codes = (grouped / scale + zero).round().clamp(0, LARGEST)
        # in units of the range: a small weight's sixth power is no float32
        left = ((codes - zero) * scale - grouped) / span
        error = left.square().pow(ERROR_POWER // 2).sum(-1, keepdim=True)
        if least is None:
            best, least = [codes, zero, scale], error
            continue
        better = error < least
        best = [torch.where(better, new, old) for new, old in zip((codes, zero, scale), best, strict=True)]
        least = torch.where(better, error, least)
    codes, zero, scale = best
    return codes.flatten(1).to(torch.uint8), zero[..., 0].to(torch.uint8), scale[..., 0].half()
