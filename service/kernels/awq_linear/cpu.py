"""AWQ linears on a CPU: torch's packed int4 product for a few rows, blocks dequantized in cache for many.

AutoAWQ's three tensors --pack_int4 (once, at load)--> codes, zeros, scales --linear--> y

`codes` is torch's int4pack order: for each block of 2 * span outputs and each input feature `span` bytes, low
nibbles the block's first half, high nibbles its second. torch documents no order, and it depends on the CPU
(AVX-512: a span of 32, AVX2: 16), so `span` packs a known matrix and looks.
"""

from functools import cache

import torch
from torch import Tensor

from service.kernels.awq_linear.reference import unpack
from service.kernels.dense_linear import widened

COLUMNS = 64  # outputs of a linear are a multiple of: whole blocks
SPANS = (32, 16)
GROUPS = (32, 64, 128, 256)  # group sizes of torch's product
MAX_PACKED_ROWS = (
    64  # from here on dequantizing costs less than the packed product's rows: docs/cpu-kernels.md
)
CHUNK_BYTES = 4 << 20  # dequantized weights in flight: stays in a server's L3, and keeps its threads busy
NIBBLES = 0x0F0F0F0F0F0F0F0F


@cache
def span() -> int:
    """Of this CPU's int4pack order; 0 where it is none that `unpack_int4` reads."""
    outputs, inputs = torch.arange(2 * COLUMNS, dtype=torch.int32), torch.arange(32, dtype=torch.int32)
    codes = (outputs[:, None] * 7 + outputs[:, None] // 16 + inputs * 5) & 0xF
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    if packed.dtype != torch.uint8:
        return 0
    return next((one for one in SPANS if torch.equal(unpack_int4(packed, one), codes.to(torch.uint8))), 0)


def fits(in_features: int, out_features: int, group: int) -> bool:
    """Can a linear of this shape be packed here?"""
    return out_features % COLUMNS == 0 and in_features % group == 0 and group in GROUPS and span() > 0


def pack_int4(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """AutoAWQ's tensors -> codes uint8 [out, in / 2], zeros int8 [in / group, out], scales [in / group, out].

    `zeros` is 8 - zero: torch's product takes (code - 8) * scale + offset, and the offset is zeros * scale.
    For bf16 activations scales are bf16, as that product reads them: converting them in each call would cost
    as much time as making the offsets. For other types they stay float16.
    """
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(qweight).t().int().contiguous(), 1)
    if dtype == torch.bfloat16:
        scales = scales.to(dtype)
    return codes, 8 - unpack(qzeros).to(torch.int8), scales


def unpack_int4(codes: Tensor, span: int) -> Tensor:
    """uint8 [out, in / 2] -> uint8 [out, in]."""
    blocks = codes.view(-1, codes.shape[1] * 2, span)  # [out / (2 * span), in, span]
    return torch.cat((blocks & 0xF, blocks >> 4), dim=-1).transpose(1, 2).reshape(codes.shape[0], -1)


@cache
def pair_workspace(groups: int, out_features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bf16 offsets [groups, out] and the pairs [groups, out, 2] that torch reads, each with its view that
    `torch.complex` takes. Kept for each shape of the model: allocating them costs as much as filling them.
    """
    offsets = torch.empty(groups, out_features, dtype=torch.bfloat16)
    pairs = torch.empty(groups, out_features, 2, dtype=torch.bfloat16)
    return offsets, offsets.view(torch.float16), pairs, torch.view_as_complex(pairs.view(torch.float16))


def scales_and_offsets(zeros: Tensor, scales: Tensor) -> Tensor:
    """zeros int8 and scales bf16, [groups, out] -> bf16 [groups, out, 2].

    The bytes resident are 3 a group; these 4 live for one call. `torch.complex` is the one vectorized
    interleaving store there is; it moves 16-bit words unseen.
    """
    offsets, offset_words, pairs, pair_words = pair_workspace(*zeros.shape)
    torch.mul(scales, zeros, out=offsets)
    torch.complex(scales.view(torch.float16), offset_words, out=pair_words)
    return pairs


def linear(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """[tokens, in] -> [tokens, out] in x's dtype; torch's product is vectorized for bfloat16 alone."""
    if x.dtype == scales.dtype == torch.bfloat16 and x.shape[0] <= MAX_PACKED_ROWS:
        group = codes.shape[1] * 2 // zeros.shape[0]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), codes, group, scales_and_offsets(zeros, scales)
        )
    y = x.new_empty(x.shape[0], codes.shape[0])
    step = max(1, CHUNK_BYTES // (codes.shape[1] * 2 * x.element_size() * COLUMNS)) * COLUMNS
    for start in range(0, codes.shape[0], step):
        part = slice(start, start + step)
        y[:, part] = widened.linear(x, dequantize(codes[part], zeros[:, part], scales[:, part], x.dtype).t())
    return y


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """-> [in, out]: (code - zero) * scale, rounded once, for a multiple of COLUMNS outputs."""
    out_features, half = codes.shape
    words = codes.view(-1, half * 2, span()).view(torch.int64)  # eight bytes an operation
    weight = torch.empty(half * 2, out_features // (2 * span()), 2, span(), dtype=dtype)
    weight[:, :, 0] = (words & NIBBLES).view(torch.uint8).transpose(0, 1)
    weight[:, :, 1] = (words >> 4 & NIBBLES).view(torch.uint8).transpose(0, 1)
    groups = weight.view(zeros.shape[0], -1, out_features)
    groups.sub_((8 - zeros).to(dtype).unsqueeze(1))  # exact: small integers
    groups.mul_(scales.to(dtype).unsqueeze(1))
    return weight.view(half * 2, out_features)
