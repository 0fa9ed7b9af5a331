"""Products of 16-bit and of 8-bit numbers on a CPU without instructions for them: in float32.

dense_linear, awq_linear, int3_linear, precision/nf4 --x, weight--> linear
int8_linear/reference --codes--> code_product

There torch multiplies bfloat16 and float16 number by number: 512 rows took 7.7 times as long as to widen both
operands and multiply in float32, 8 rows 2.8 times (Zen 3, a linear of 1536 x 576). One row and two are faster
as they are. Sums are float32 either way, and rounded once here. Codes take 2.5 times as long at one row, 44
times at 512 (torch._int_mm, same machine).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST_ROWS = 3
WIDENED_WEIGHTS = 1 << 20  # at a time, 4 MiB
EXACT_INPUTS = 1024  # as many products of codes add up below 2^24, to which float32 has all whole numbers


@cache
def has_products(dtype: torch.dtype) -> bool:
    """Does this CPU multiply numbers of this type?"""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is not torch.int8 or torch.cpu._is_vnni_supported()


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


def code_product(x: Tensor, weight: Tensor) -> Tensor:
    """int8 x [T, in], weight [out, in] -> int32 [T, out], exact."""
    out_features, in_features = weight.shape
    wide, y = x.float(), x.new_zeros(len(x), out_features, dtype=torch.int32)
    step = max(1, WIDENED_WEIGHTS // EXACT_INPUTS)
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        for first in range(0, in_features, EXACT_INPUTS):
            some = slice(first, first + EXACT_INPUTS)
            y[:, part] += F.linear(wide[:, some], weight[part, some].float()).int()
    return y
