"""A decode step's first and last kernel: the running requests' rows -> what the model reads, and back.

engine/state --fields, tables, rows--> read_rows --> decoder; sampler --token ids--> write_rows --> fields

Column 0 of `fields` is a row's length, the tokens that its K and V are cached of; column 1 is its last token,
which is to be computed next. No source: it is a gather and a scatter.
"""

import torch
from torch import Tensor

from service.kernels.row_state import reference

__all__ = ["read_rows", "write_rows"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define(
    "read_rows(Tensor fields, Tensor tables, Tensor rows, int block_tokens) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
library.define("write_rows(Tensor(a!) fields, Tensor rows, Tensor token_ids, int padding) -> ()")
library.impl("read_rows", reference.read_rows, "CompositeExplicitAutograd")
library.impl("write_rows", reference.write_rows, "CompositeExplicitAutograd")

if torch.cuda.is_available():
    from service.kernels.row_state import triton as cuda

    library.impl("read_rows", cuda.read_rows, "CUDA")
    library.impl("write_rows", cuda.write_rows, "CUDA")

_read_rows = torch.ops.halftone.read_rows.default
_write_rows = torch.ops.halftone.write_rows.default


def read_rows(
    fields: Tensor, tables: Tensor, rows: Tensor, block_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """int32 [requests, words], int32 [requests, max blocks], int32 [rows] -> for each of `rows`

    the token to compute (int64), its position and slot (int64), its length with that token (int32), and its
    blocks (int32 [rows, max blocks], contiguous, undefined behind the last that the length needs).
    """
    token_ids, positions, slots, lengths, blocks = _read_rows(fields, tables, rows, block_tokens)
    return token_ids, positions, slots, lengths, blocks


def write_rows(fields: Tensor, rows: Tensor, token_ids: Tensor, padding: int) -> None:
    """One token more in the cache of each of `rows` (int32), and what was drawn behind it (int64).

    A negative id is kept as 0: it is not to be looked up. Row `padding` stays at length 0.
    """
    _write_rows(fields, rows, token_ids, padding)
