"""LLM.int8() linears in torch, outliers decided in each row: one int8 product, and no wait for the device.

A row of x becomes three rows of codes: what lies below the threshold, as bitsandbytes codes it, and the row's
outliers as 16-bit numbers in two halves, `coarse` in 127ths of the largest, `fine` in 254ths of such a step.
All are multiplied with the weight at once, which is read once and as it is. The sums are exact integers, so a
row's result does not depend on the rows beside it, bit for bit, and nothing has to be counted or gathered.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from service.kernels.dense_linear import widened

ROWS_AT_ONCE = 512  # of x, which bounds the int32 sums [3 * rows, out]
ROW_MULTIPLE = 32  # of the stacked rows there, of which it wants more than 16
MULTIPLE = 8  # of its inputs and outputs


def linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """x [T, in] -> [T, out] in x's type, rounded once; threshold 0: there are no outliers.

    codes int8 [out, in], scales float32 [out] (the largest magnitude of each row of weights), bias [out].
    """
    y = x.new_empty(x.shape[0], codes.shape[0])
    on_cpu = x.device.type == "cpu"  # where nothing waits for the answer to a question
    for rows, part in zip(x.split(ROWS_AT_ONCE), y.split(ROWS_AT_ONCE), strict=True):
        product = products(rows, codes, threshold, on_cpu) if threshold else regular(rows, codes)
        product *= scales / 127
        part.copy_(product if bias is None else product + bias)
    return y


def regular(x: Tensor, codes: Tensor) -> Tensor:
    """[T, in] -> float32 [T, out], without outliers and the weights' scales."""
    x_codes, step = quantize(x.half().float())
    return multiply(x_codes, codes).float() * step


def products(x: Tensor, codes: Tensor, threshold: float, looks: bool) -> Tensor:
    """[T, in] -> float32 [T, out], without the weights' scales.

    `looks`: multiply outliers only of rows that have some, which asks the device for their number.
    """
    rounded = x.half()
    is_outlier = rounded.abs() >= threshold
    x_codes, step = quantize(rounded.float().masked_fill(is_outlier, 0))
    having = is_outlier.any(1).nonzero()[:, 0] if looks else slice(None)
    outliers = x[having].float().masked_fill(~is_outlier[having], 0)
    coarse, coarse_step = quantize(outliers)
    rest = outliers - coarse * coarse_step
    fine = (rest * (254 / coarse_step)).nan_to_num_(0).round_().clamp_(-127, 127).to(torch.int8)
    sums = multiply(torch.cat((x_codes, coarse, fine)), codes).float()
    below, coarse_sums, fine_sums = sums.split((len(x_codes), len(coarse), len(fine)))
    y = below * step
    y[having] += coarse_sums * coarse_step
    y[having] += fine_sums * (coarse_step / 254)
    return y


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [T, in] -> int8 [T, in] and the step of each row [T, 1], its largest magnitude / 127."""
    most = x.abs().amax(1, keepdim=True)
    return (x * (127 / most)).nan_to_num_(0).round_().to(torch.int8), most / 127


def multiply(x_codes: Tensor, codes: Tensor) -> Tensor:
    """int8 [T, in] and [out, in] -> int32 [T, out]."""
    num_rows, num_outputs = len(x_codes), len(codes)
    if x_codes.is_cpu and not widened.has_products(torch.int8):
        return widened.code_product(x_codes, codes)
    if x_codes.is_cuda:
        more_inputs = -x_codes.shape[1] % MULTIPLE
        x_codes = F.pad(x_codes, (0, more_inputs, 0, -num_rows % ROW_MULTIPLE))
        if more_inputs or num_outputs % MULTIPLE:
            codes = F.pad(codes, (0, more_inputs, 0, -num_outputs % MULTIPLE))
    return torch._int_mm(x_codes, codes.t())[:num_rows, :num_outputs]
