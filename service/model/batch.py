"""What one step computes on, as tensors: the contract between the engine's runner and the decoder.

T tokens of S sequences lie flat, one sequence after another; sequences with one new token (decode) come
first. KV pages hold BLOCK_TOKENS tokens; a slot is `block * BLOCK_TOKENS + offset`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from service.kernels.kv_codes import is_coded
from service.kernels.paged_attention import PromptTiles

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
    # The lists' contents as tensors, where the device has them. A step whose tensors change between replays
    # has no `context_lengths`: it is empty. Beyond its own rows and sequences it has padding then.
    lengths: Tensor | None = None  # int32 [S]
    starts: Tensor | None = None  # int32 [S + 1]
    logit_slots: Tensor | None = None  # int64 [R], slots of the rows wanted, where some are padding
    tiles: PromptTiles | None = None  # where there are prompts among what changes


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


def sequence_batch(token_ids: list[int], blocks: list[int], device: torch.device) -> StepBatch:
    """A prefill step over one whole sequence; no rows of logits."""
    positions = torch.arange(len(token_ids), device=device)
    table = torch.tensor([blocks], dtype=torch.int32, device=device)
    return StepBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=positions,
        slots=table[0].long()[positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        query_starts=[0, len(token_ids)],
        context_lengths=[len(token_ids)],
        block_tables=table[:, : -(-len(token_ids) // BLOCK_TOKENS)],
        num_decode=0,
        logit_rows=torch.empty(0, dtype=torch.int64, device=device),
    )


def position_batch(
    lanes: list[list[int]], blocks: list[list[int]], position: int, device: torch.device
) -> StepBatch:
    """A decode step of all lanes, each with its token at `position`."""
    num_lanes = len(lanes)
    num_blocks = position // BLOCK_TOKENS + 1
    tables = torch.tensor(
        [blocks[i][:num_blocks] for i in range(num_lanes)], dtype=torch.int32, device=device
    )
    return StepBatch(
        token_ids=torch.tensor([lane[position] for lane in lanes], device=device),
        positions=torch.full((num_lanes,), position, device=device),
        slots=tables[:, -1].long() * BLOCK_TOKENS + position % BLOCK_TOKENS,
        query_starts=list(range(num_lanes + 1)),
        context_lengths=[position + 1] * num_lanes,
        block_tables=tables,
        num_decode=num_lanes,
        logit_rows=torch.arange(num_lanes, device=device),
    )
