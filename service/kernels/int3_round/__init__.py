"""Weights rounded to codes of three bits: of a few clippings of each group's range the one that errs least.

precision/int3 --weight--> round_groups --codes, zeros, scales--> kernels/int3_linear or w4_linear pack them

By torch on a CPU; on CUDA in one pass over the weight, with the same arithmetic: only the sum of a group's
errors has another order, so that of two clippings that are as good, to the last digits of float32, either may
be taken.
"""

import torch
from torch import Tensor

from service.kernels.int3_round import reference

__all__ = ["round_groups"]

if torch.cuda.is_available():
    from service.kernels.int3_round import triton as cuda


def round_groups(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> codes and zeros uint8 [out, in] and [out, groups], scales float16 [out, groups].

    A group of zeros has scale 1, so that 0 means 0. A scale is no number where a weight is none, and infinite
    where a group's range is beyond float16's.
    """
    if weight.is_cuda:
        return cuda.round_groups(weight, group_size)
    return reference.round_groups(weight, group_size)
