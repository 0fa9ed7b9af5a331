"""What one step computes on, as tensors: the contract between the engine's runner and the decoder.

T tokens of S sequences lie flat, one sequence after another; sequences with one new token (decode) come
first. KV pages hold BLOCK_TOKENS tokens; a slot is `block * BLOCK_TOKENS + offset`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.kernels.kv_codes import is_coded

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class StepBatch:
    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], absolute in its sequence
    slots: Tensor  # int64 [T], where this token's K and V are written
    query_starts: list[int]  # [S + 1], first row of each sequence; the last is T
    context_lengths: list[int]  # [S], tokens of K and V after this step
    block_tables: Tensor  # int32 [S, max blocks], rows padded with 0
    num_decode: int  # the first `num_decode` sequences have one new token each
    logit_rows: Tensor  # int64 [R], rows of which logits are wanted, ascending
    # The lists' contents as tensors, where the device has them. A decode step whose tensors change between
    # replays has no `context_lengths`: it is empty.
    lengths: Tensor | None = None  # int32 [S]
    starts: Tensor | None = None  # int32 [S + 1]


class PagedKV:
    """K and V of every layer, each one tensor [block, kv_head, token, head_dim], of values or of 8-bit codes.

    Codes have their scales beside them: bfloat16 [block, kv_head, token, 2] a layer, K's and V's; values have
    None. Block 0 is never handed out: padding rows of a fixed-size batch write there.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, num_kv_heads, BLOCK_TOKENS, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.scales: list[Tensor | None] = [
            torch.zeros(*shape[:-1], 2, dtype=torch.bfloat16, device=device) if is_coded(dtype) else None
            for _ in range(num_layers)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [*self.keys, *self.values, *(scales for scales in self.scales if scales is not None)]

    @property
    def num_blocks(self) -> int:
        return self.keys[0].shape[0]

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
