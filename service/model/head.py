"""The two ends of the decoder: token ids -> embeddings, hidden states -> logits.

Both stay 16-bit, and are one tensor where the checkpoint ties them. As an option lm_head is 8-bit: weight
only, symmetric, one scale a row, chosen as max |w| / 127.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from service.kernels.dense_linear import (
    bind_linear,
    dense_linear,
    is_row_invariant,
    linear_kernel,
    packed_bytes,
)
from service.kernels.dense_linear.table import pack_table


class Embedding(nn.Module):
    weight: Tensor  # [vocab, hidden], packed for `dense_linear` if it is the head too

    def __init__(self, weight: Tensor, *, is_head: bool) -> None:
        super().__init__()
        self.table = pack_table(weight) if is_head else None
        self.register_buffer("weight", self.table.packed if self.table else weight)

    def forward(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, hidden].

        On a GPU by torch's kernel, which keeps a step's layers apart from what precedes them, for
        kernels/decode_attention.
        """
        return self.table.rows(token_ids) if self.table else F.embedding(token_ids, self.weight)

    def bytes(self) -> int:
        return packed_bytes(self.weight)


class FullHead(nn.Module):
    weight: Tensor  # [vocab, hidden], from `pack_weight` or the embedding's own

    def __init__(self, weight: Tensor, *, deterministic: bool = False) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.kernel = linear_kernel(weight, deterministic=deterministic)
        self.row_invariant = is_row_invariant(weight, deterministic=deterministic)
        self.bound = bind_linear(weight, deterministic=deterministic)
        self.chosen_by_rows = weight.is_cuda and weight.itemsize == 2 and not deterministic

    def forward(self, x: Tensor) -> Tensor:
        """[R, hidden] -> [R, vocab], float32 on a CPU, on CUDA x's type: kernels there widen as they read."""
        logits = self.bound(x) if self.bound else dense_linear(x, self.weight)
        return logits if logits.is_cuda else logits.float()

    def bytes(self) -> int:
        return packed_bytes(self.weight)


class Int8Head(nn.Module):
    codes: Tensor  # int8 [vocab, hidden]
    scales: Tensor  # x's dtype [vocab]
    kernel = "torch._weight_int8pack_mm"
    chosen_by_rows = False
    row_invariant = False

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
