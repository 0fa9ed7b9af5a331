"""What `w8_tile.cu` computes, in torch: for tests."""

import torch
from torch import Tensor

from service.kernels.int8_rows import Marks, OutlierRule


def int8_linear(
    codes: Tensor, steps: Tensor, bias: Tensor | None, rule: OutlierRule, marks: Marks, rows: object
) -> Tensor:
    """`rows`, as int8_rows has left them with these marks -> [T, out] in their type."""
    from service.kernels.int8_rows.triton import Rows

    assert isinstance(rows, Rows)
    assert rows.x is not None
    x, x_codes, x_steps = rows.x.float(), rows.codes[0], rows.scales[0]
    bits = marks.bitmap[:, None] >> torch.arange(32, dtype=torch.int32, device=x.device) & 1
    is_listed = bits.flatten()[: x.shape[1]].bool()
    outliers = x * is_listed * (x.abs() >= told_threshold(rule))
    sums = x_codes.double() @ codes.double().t() * x_steps[:, None] + outliers.double() @ codes.double().t()
    y = (sums * steps).to(rows.dtype)
    return y if bias is None else y + bias


def fp8_linear(
    codes: Tensor, scales: Tensor, dtype: torch.dtype, x_codes: Tensor, x_scales: Tensor
) -> Tensor:
    """Codes of rows [T, in] and what they count [T] -> [T, out], rounded once."""
    return (x_codes.double() @ codes.double().t() * (x_scales[:, None] * scales)).to(dtype)


def told_threshold(rule: OutlierRule) -> float:
    """From which on a number in a listed column counts: by batch all do; where there are no outliers none."""
    if not rule.threshold:
        return float("inf")
    return rule.threshold if rule.by_row else 0.0
