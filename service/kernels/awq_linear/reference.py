"""What an AWQ linear means, readable beside the format: AutoAWQ's GEMM layout, see README.md."""

import torch
from torch import Tensor

# bits 4i..4i+3 of a word hold this column of its eight
NIBBLE_TO_COLUMN = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack(words: Tensor) -> Tensor:
    """int32 [rows, columns / 8] -> uint8 [rows, columns], values 0..15."""
    nibbles = torch.stack([words >> 4 * i & 0xF for i in range(8)], dim=-1)  # [rows, columns / 8, 8]
    columns = torch.empty_like(nibbles, dtype=torch.uint8)
    columns[..., list(NIBBLE_TO_COLUMN)] = nibbles.to(torch.uint8)
    return columns.flatten(-2)


def pack(values: Tensor) -> Tensor:
    """Integers [rows, columns], values 0..15 -> int32 [rows, columns / 8]. Inverse of `unpack`."""
    nibbles = values.to(torch.int32).unflatten(-1, (-1, 8))[..., list(NIBBLE_TO_COLUMN)]
    words = torch.zeros_like(nibbles[..., 0])
    for i in range(8):
        words |= nibbles[..., i] << 4 * i
    return words


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """-> float32 [in, out]: (code - zero) * scale, zero and scale shared by a group of input features."""
    group = qweight.shape[0] // qzeros.shape[0]
    centred = unpack(qweight).float() - unpack(qzeros).float().repeat_interleave(group, dim=0)
    return centred * scales.float().repeat_interleave(group, dim=0)


def awq_linear(x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """[tokens, in] -> [tokens, out] in x's dtype, computed in it."""
    return x @ dequantize(qweight, qzeros, scales).to(x.dtype)
