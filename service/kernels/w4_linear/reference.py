"""What a W4 linear means, on any device: layout -> codes -> weights -> product. The kernels' oracle."""

import torch
from torch import Tensor

from service.kernels.w4_linear.layout import (
    BLOCK_ROWS,
    NESTED_BLOCK,
    NF4_BLOCK,
    Weight,
    from_block,
    unpack_codes,
    unpack_zeros,
)

# quantiles of a normal distribution, the largest magnitude 1: arXiv 2305.14314, appendix E
# fmt: off
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


def absmax(weight: Weight) -> Tensor:
    """NF4's, decoded: float32 [out, in / 64]."""
    nested = weight.nested
    assert nested is not None
    codes = from_block(weight.scales)
    parts = []
    for rows, first, offset in zip(
        codes.split(list(weight.outs)), weight.first_nested(), nested.offsets, strict=True
    ):
        place = torch.arange(rows.numel(), device=rows.device) // NESTED_BLOCK + first
        parts.append(nested.map[rows.long()] * nested.absmax[place].view(rows.shape) + offset)
    return torch.cat(parts)


def dequantize(weight: Weight, part: int | None = None) -> Tensor:
    """float32 [out of this part (None: of all), in]."""
    end = sum(weight.outs[: part + 1]) if part is not None else weight.out_features
    start = end - weight.outs[part] if part is not None else 0
    codes = unpack_codes(weight.codes[start // BLOCK_ROWS : end // BLOCK_ROWS], weight.kind)
    if weight.zeros is None:
        levels = torch.tensor(NF4_LEVELS, device=codes.device)
        return levels[codes.int()] * absmax(weight)[start:end].repeat_interleave(NF4_BLOCK, dim=1)
    zeros = unpack_zeros(weight.zeros)[start:end]
    scales = from_block(weight.scales)[start:end].float()
    centred = codes.float() - zeros.float().repeat_interleave(weight.group_size, dim=1)
    return centred * scales.repeat_interleave(weight.group_size, dim=1)


def w4_linear(x: Tensor, weight: Weight) -> Tensor:
    """[tokens, in] -> [tokens, out] in x's dtype, computed in it."""
    return x @ dequantize(weight).to(x.dtype).t()
