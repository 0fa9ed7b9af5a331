"""Where weights lie for the native linears: blocks of 64 outputs, which one thread takes at a time.

precision --[out, n] tensors--> blocks, as kernels/native/*.c draw them; each function has its inverse.
"""

import torch
from torch import Tensor

BLOCK = 64  # outputs
LANES = 16  # outputs in a register
NIBBLES = 4  # of a 16-bit lane: one for each register of a block


def to_blocks(values: Tensor, together: int = 1) -> Tensor:
    """[out, n] -> [out / 64, n / together, 64 * together]: of an output so many values side by side."""
    out, n = values.shape
    blocks = values.view(out // BLOCK, BLOCK, n // together, together).transpose(1, 2)
    return blocks.contiguous().view(out // BLOCK, n // together, BLOCK * together)


def from_blocks(blocks: Tensor, together: int = 1) -> Tensor:
    num_blocks, steps, _ = blocks.shape
    values = blocks.view(num_blocks, steps, BLOCK, together).transpose(1, 2)
    return values.reshape(num_blocks * BLOCK, steps * together)


def to_nibbles(codes: Tensor, together: int) -> Tensor:
    """uint8 [out, n], values 0..15 -> uint8 [out / 64, n / together, 32 * together].

    The bytes are 16-bit lanes; nibble c of lane `together` o + f is the code of output 16 c + o, value f.
    """
    out, n = codes.shape
    lanes = codes.view(out // BLOCK, NIBBLES, LANES, n // together, together).permute(0, 3, 2, 4, 1)
    low, high = lanes[..., 0::2], lanes[..., 1::2]
    return (low | high << 4).contiguous().view(out // BLOCK, n // together, LANES * together * 2)


def from_nibbles(packed: Tensor, together: int) -> Tensor:
    num_blocks, steps, _ = packed.shape
    halves = packed.view(num_blocks, steps, LANES, together, 2)
    lanes = torch.stack((halves & 0xF, halves >> 4), dim=-1).flatten(-2)
    codes = lanes.permute(0, 4, 2, 1, 3)  # [blocks, nibble, lane, steps, together]
    return codes.reshape(num_blocks * BLOCK, steps * together)
