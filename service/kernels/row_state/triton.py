"""Reading and writing rows on CUDA: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, launch

WIDTH = 256  # entries of a block table that are copied at a time


# where the rows lie among the state's words changes with the number of requests
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["max_blocks", "stride"], do_not_specialize_on_alignment=["rows_ptr"]
)
def read_rows_kernel(  # type: ignore[no-untyped-def]
    fields_ptr,  # int32 [requests, WORDS]
    tables_ptr,  # int32 [requests, stride]
    rows_ptr,  # int32 [rows]
    token_ids_ptr,  # int64 [rows]
    positions_ptr,  # int64 [rows]
    slots_ptr,  # int64 [rows]
    lengths_ptr,  # int32 [rows]
    blocks_ptr,  # int32 [rows, max_blocks]
    max_blocks,
    stride,
    WORDS: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    position = tl.load(fields_ptr + row * WORDS)
    token_id = tl.load(fields_ptr + row * WORDS + 1)
    table = tables_ptr + row * stride
    block = tl.load(table + position // PAGE).to(tl.int64)
    tl.store(token_ids_ptr + place, token_id.to(tl.int64))
    tl.store(positions_ptr + place, position.to(tl.int64))
    tl.store(slots_ptr + place, block * PAGE + position % PAGE)
    tl.store(lengths_ptr + place, position + 1)
    num_blocks = position // PAGE + 1
    for first in range(0, num_blocks, WIDTH):
        entries = first + tl.arange(0, WIDTH)
        inside = entries < num_blocks
        tl.store(
            blocks_ptr + place * max_blocks + entries, tl.load(table + entries, mask=inside), mask=inside
        )


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["padding"], do_not_specialize_on_alignment=["rows_ptr"]
)
def write_rows_kernel(  # type: ignore[no-untyped-def]
    fields_ptr,  # int32 [requests, WORDS]
    rows_ptr,  # int32 [rows]
    token_ids_ptr,  # int64 [rows]
    padding,
    WORDS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    token_id = tl.load(token_ids_ptr + place)
    length = tl.load(fields_ptr + row * WORDS) + 1
    tl.store(fields_ptr + row * WORDS, tl.where(row == padding, 0, length))
    tl.store(fields_ptr + row * WORDS + 1, tl.maximum(token_id, 0).to(tl.int32))


def read_rows(
    fields: Tensor, tables: Tensor, rows: Tensor, block_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See the package."""
    num_rows, max_blocks = rows.shape[0], tables.shape[1]
    token_ids, positions, slots = (
        torch.empty(num_rows, dtype=torch.int64, device=rows.device) for _ in range(3)
    )
    lengths = torch.empty(num_rows, dtype=torch.int32, device=rows.device)
    blocks = torch.empty(num_rows, max_blocks, dtype=torch.int32, device=rows.device)
    launch(
        read_rows_kernel,
        (num_rows,),
        (fields, tables, rows, token_ids, positions, slots, lengths, blocks),
        (max_blocks, tables.stride(0)),
        (fields.shape[1], block_tokens, WIDTH),
    )
    return token_ids, positions, slots, lengths, blocks


def write_rows(fields: Tensor, rows: Tensor, token_ids: Tensor, padding: int) -> None:
    """See the package."""
    tensors = (fields, rows, token_ids.contiguous())
    launch(write_rows_kernel, (rows.shape[0],), tensors, (padding,), (fields.shape[1],), num_warps=1)
