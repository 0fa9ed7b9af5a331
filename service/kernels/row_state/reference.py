"""What reading and writing rows means, in plain torch; it serves every device."""

import torch
from torch import Tensor


def read_rows(
    fields: Tensor, tables: Tensor, rows: Tensor, block_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the package."""
    read = fields[:, :2].index_select(0, rows)
    positions, token_ids = read.t().contiguous().long().unbind(0)
    blocks = tables.index_select(0, rows)
    block = blocks.gather(1, (positions // block_tokens).unsqueeze(1)).squeeze(1)
    slots = block.long() * block_tokens + positions % block_tokens
    return token_ids, positions, slots, read[:, 0] + 1, blocks


def write_rows(fields: Tensor, rows: Tensor, token_ids: Tensor, padding: int) -> None:
    """See the package."""
    lengths = (fields[:, 0].index_select(0, rows) + 1).masked_fill_(rows == padding, 0)
    written = torch.stack((lengths, token_ids.clamp(min=0).int()), 1)
    fields[:, :2].index_copy_(0, rows.long(), written)
