"""What a linear of three bits means, and how torch computes it: see README.md for the layout."""

import torch
from torch import Tensor

from service.kernels.dense_linear import widened

TOGETHER = 32  # codes in three words
CHUNK_WEIGHTS = 1 << 20  # that exist dequantized at once: 4 MiB in float32, more would only take memory


def pack(codes: Tensor) -> Tensor:
    """Integers 0..7 [rows, columns], rows a multiple of 32 -> int32 [rows / 32, 3, columns]."""
    together = codes.to(torch.int64).unflatten(0, (-1, TOGETHER))  # [rows / 32, 32, columns]
    places = torch.arange(TOGETHER, device=codes.device)[:, None]
    low = (together & 3) << places % 16 * 2
    high = (together >> 2) << places
    words = torch.cat((low.unflatten(1, (2, 16)).sum(2), high.sum(1, keepdim=True)), dim=1)
    return (words - (words >> 31 << 32)).to(torch.int32)  # as the bits of a signed word


def unpack(words: Tensor) -> Tensor:
    """int32 [rows / 32, 3, columns] -> uint8 [rows, columns], values 0..7. Inverse of `pack`.

    Byte by byte, from the lowest of a word: eight bits are as many codes a step as a vector can have.
    """
    blocks, _, columns = words.shape
    pieces = words.reshape(-1).view(torch.uint8).view(blocks, 3, columns, 4).transpose(2, 3).contiguous()
    places = torch.arange(8, dtype=torch.uint8, device=words.device)[:, None]
    low = pieces[:, :2, :, None] >> places[:4] * 2  # [blocks, 2, 4, 4, columns]
    high = pieces[:, 2, :, None] >> places  # [blocks, 4, 8, columns]
    low.bitwise_and_(3)
    high.bitwise_and_(1).mul_(4)
    return low.reshape(blocks, TOGETHER, columns).add_(high.reshape(blocks, TOGETHER, columns)).flatten(0, 1)


def pack_zeros(zeros: Tensor) -> Tensor:
    """Integers 0..7 [out, groups] -> uint8 [groups, out / 2]: even outputs in low nibbles."""
    by_group = zeros.t().to(torch.uint8).contiguous()
    return by_group[:, 0::2] | by_group[:, 1::2] << 4


def unpack_zeros(zeros: Tensor) -> Tensor:
    """Inverse of `pack_zeros`, by group: uint8 [groups, out]."""
    return torch.stack((zeros & 15, zeros >> 4), dim=-1).flatten(1)


def dequantize(codes: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """-> [in, out]: (code - zero) * scale, computed in float32 and rounded once."""
    num_groups, columns = scales.shape
    centred = unpack(codes).view(torch.int8).unflatten(0, (num_groups, -1))  # [groups, group, out]
    centred -= unpack_zeros(zeros).view(torch.int8)[:, None]
    weight = centred.float().mul_(scales.float()[:, None])
    return weight.view(-1, columns).to(dtype)


def int3_linear(x: Tensor, codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """x [tokens, in] of any float type -> [tokens, out] in its type, a block of outputs at a time."""
    in_features, out_features = x.shape[1], scales.shape[1]
    columns = max(TOGETHER, CHUNK_WEIGHTS // in_features // TOGETHER * TOGETHER)
    y = x.new_empty(x.shape[0], out_features)
    for start in range(0, out_features, columns):
        block = slice(start, start + columns)
        pairs = slice(start // 2, (start + columns) // 2)
        weight = dequantize(codes[:, :, block], zeros[:, pairs], scales[:, block], x.dtype)
        y[:, block] = widened.linear(x, weight.t())
    return y
