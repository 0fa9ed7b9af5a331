"""An embedding that is also the head: packed once, and its rows can still be looked up.

Our own packing is known (native.py). oneDNN's blocked layouts are separable: an element's place is one offset
by its row plus one by its column, and rows repeat in blocks. Both offsets are found by packing numbered
weights, then checked on every element of the real one, so a layout that is not of this kind is refused and
the caller keeps the plain weight.
"""

import ctypes

import torch
from torch import Tensor

from service.kernels.dense_linear import native, pack_onednn, packed_bytes

PROBE_ROWS = 256  # a multiple of every block of rows that oneDNN uses
DIGIT_BITS = 7  # numbers up to 2^7 are exact in bfloat16
CHECKED_ROWS = 1024  # at a time, to bound memory


class PackedTable:
    """A weight [rows, columns] as `dense_linear` wants it, and its rows by number."""

    def __init__(
        self, packed: Tensor, dtype: torch.dtype, row_offsets: Tensor, column_offsets: Tensor
    ) -> None:
        self.packed = packed
        self.row_offsets = row_offsets  # int64 [rows]
        self.column_offsets = column_offsets  # int64 [columns]
        self._flat = _memory(packed, dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """int64 [T] -> [T, columns]."""
        return self._flat.take(self.row_offsets[ids][:, None] + self.column_offsets)


def pack_table(weight: Tensor) -> PackedTable | native.NativeTable | None:
    """[rows, columns] -> its table, or None where this weight is not packed or its layout is another."""
    if native.fits(weight):
        return native.NativeTable(weight)
    num_rows, num_columns = weight.shape
    packed = pack_onednn(weight)
    if not packed.is_mkldnn:
        return None
    by_row = _offsets(weight.dtype, num_columns, along_rows=True)
    by_column = _offsets(weight.dtype, num_columns, along_rows=False)
    if by_row is None or by_column is None:
        return None
    rows = torch.arange(num_rows)
    probe_size = packed_bytes(pack_onednn(weight.new_zeros(PROBE_ROWS, num_columns))) // weight.element_size()
    row_offsets = rows // PROBE_ROWS * probe_size + by_row[rows % PROBE_ROWS]
    if int(row_offsets.max() + by_column.max()) >= packed_bytes(packed) // weight.element_size():
        return None
    table = PackedTable(packed, weight.dtype, row_offsets, by_column)
    for ids in rows.split(CHECKED_ROWS):
        if not torch.equal(table.rows(ids), weight[ids]):
            return None
    return table


def _offsets(dtype: torch.dtype, num_columns: int, *, along_rows: bool) -> Tensor | None:
    """Where the first column's (or first row's) elements lie after packing, relative to the first."""
    count = PROBE_ROWS if along_rows else num_columns
    numbers = torch.arange(count)
    found = torch.zeros(0, dtype=torch.int64)
    read = torch.zeros(count, dtype=torch.int64)
    for digit in range(0, max(count - 1, 1).bit_length(), DIGIT_BITS):
        probe = torch.zeros(PROBE_ROWS, num_columns, dtype=dtype)
        line = probe[:, 0] if along_rows else probe[0]
        # one more than the digit: zero marks every other place
        line.copy_(((numbers >> digit) & ((1 << DIGIT_BITS) - 1)) + 1)
        packed = pack_onednn(probe)
        memory = _memory(packed, dtype)
        found = memory.nonzero()[:, 0]
        if found.numel() != count:
            return None
        read += (memory[found].long() - 1) << digit
    offsets = torch.empty_like(found)
    offsets[read] = found
    return offsets - offsets[0]


def _memory(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """An opaque oneDNN tensor's bytes as a flat tensor, valid while `packed` lives."""
    size, address = packed_bytes(packed), torch.ops.mkldnn.data_ptr(packed)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)
