"""K and V of a token and head as 8-bit codes under one scale: the definition, in plain torch.

rotary_kv --quantized--> codes and scales in their pages --coded_attention--> y

Symmetric: a value is code * scale. int8 codes are -127..127, fp8 ones E4M3. The scale is bfloat16, so that
it has every exponent that a value has; a code is rounded from the stored scale, whose own rounding
therefore costs less than half a step of the largest value. K's and V's scale of a token lie side by side,
four bytes, which a GPU fetches at once. One scale for everything would suffice for E4M3's range, not for its
quality: docs/quality.md.

Whatever the values were, codes are finite: a broken value breaks the scale. So a page that nobody has
written may be multiplied by a weight of zero.
"""

import torch
from torch import Tensor

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # code of a head's largest value
LEAST_SCALE = 2.0**-60  # what is smaller becomes zero; attention divides by scales


def is_coded(dtype: torch.dtype) -> bool:
    """Whether a cache of this type holds codes."""
    return dtype in LARGEST


def quantized(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[..., head_dim], any float type -> codes of `dtype`, the same shape, and bfloat16 scales [...]."""
    wide = x.float()
    scales = (wide.abs().amax(-1) * (1 / LARGEST[dtype])).to(torch.bfloat16)
    scales = torch.where(scales < LEAST_SCALE, LEAST_SCALE, scales)
    inverse = 1 / scales.float()[..., None]
    scaled = torch.where(inverse > 0, wide * inverse, 0.0)  # NaN, or infinite values: the scale tells
    if dtype is torch.int8:
        return scaled.round().to(dtype), scales
    # within 448: torch makes NaN of what rounds beyond
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype), scales


def dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes [..., head_dim] and bfloat16 [...] -> `dtype`, rounded once; float32 is exact."""
    if dtype is torch.bfloat16:  # holds codes and scales as they are, and half the bytes pass through memory
        return codes.to(dtype).mul_(scales[..., None])
    return (codes.float() * scales.float()[..., None]).to(dtype)
