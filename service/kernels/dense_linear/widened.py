"""Products of 16-bit numbers on a CPU without instructions for them: in float32.

dense_linear, awq_linear, int3_linear, precision/nf4 --x, weight--> linear

There torch multiplies bfloat16 and float16 number by number: 512 rows took 7.7 times as long as to widen both
operands and multiply in float32, 8 rows 2.8 times (Zen 3, a linear of 1536 x 576). One row and two are faster
as they are. Sums are float32 either way, and rounded once here.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 3
WIDENED_WEIGHTS = 1 << 20  # at a time, 4 MiB


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Does this CPU multiply numbers of this type?"""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in], weight [out, in], bias [out], all of one type -> [T, out]; `F.linear` where that is fast."""
    if not x.is_cpu or len(x) < FEWEST_ROWS or has_products(x.dtype):
        return F.linear(x, weight, bias)
    out_features, in_features = weight.shape
    wide, y = x.float(), x.new_empty(len(x), out_features)
    step = max(1, WIDENED_WEIGHTS // in_features)
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        y[:, part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return y
