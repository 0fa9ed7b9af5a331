"""lm_head: hidden states -> float32 logits, from 16-bit weights or, as an option, 8-bit ones.

The 16-bit head may be the embedding's own tensor. The 8-bit one is weight-only and symmetric, one scale a
row, chosen as max |w| / 127.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FullHead(nn.Module):
    weight: Tensor  # [vocab, hidden]
    kernel = "torch.linear"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        """[R, hidden] -> float32 [R, vocab]."""
        return F.linear(x, self.weight).float()

    def bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


class Int8Head(nn.Module):
    codes: Tensor  # int8 [vocab, hidden]
    scales: Tensor  # x's dtype [vocab]
    kernel = "torch._weight_int8pack_mm"

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        scales = weight.abs().amax(1).float().div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        scales = scales.to(weight.dtype)
        codes = (weight.float() / scales.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        """[R, hidden] -> float32 [R, vocab]."""
        return torch._weight_int8pack_mm(x, self.codes, self.scales).float()

    def bytes(self) -> int:
        return self.codes.numel() + self.scales.numel() * self.scales.element_size()
