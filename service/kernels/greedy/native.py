"""A greedy step in C: float32 on a CPU, one pass over the logits; anything else is the reference's."""

from collections.abc import Callable
from ctypes import c_char_p
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from service.kernels.greedy import reference
from service.kernels.native import Library, load

MAX_VOCAB = 2**31 - 1  # indices are counted in 32 bits
_pack = Struct("2P2q").pack  # struct greedy in greedy_avx512.c


def greedy(logits: Tensor) -> Tensor:
    """See the package."""
    library = load()
    if library is None or logits.dtype is not torch.float32 or not logits.is_contiguous():
        return reference.greedy(logits)
    rows, columns = logits.shape
    if not 0 < columns <= MAX_VOCAB:
        return reference.greedy(logits)
    token_ids = torch.empty(rows, dtype=torch.int64)
    _function(library)(_pack(logits.data_ptr(), token_ids.data_ptr(), rows, columns))
    return token_ids


@cache
def _function(library: Library) -> Callable[[bytes], None]:
    return library.function("halftone_greedy", [c_char_p])
