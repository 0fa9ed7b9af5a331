"""Each row's likeliest token, and whether the model's numbers are whole. No source: it is an argmax.

decoder --logits [rows, vocab]--> greedy --token ids--> sampler, for a step in which no row draws
"""

import torch
from torch import Tensor

from service.kernels.greedy import native, reference

__all__ = ["greedy"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define("greedy(Tensor logits) -> Tensor")
library.impl("greedy", reference.greedy, "CompositeExplicitAutograd")
library.impl("greedy", native.greedy, "CPU")

if torch.cuda.is_available():
    from service.kernels.greedy import triton as cuda

    library.impl("greedy", cuda.greedy, "CUDA")

_greedy = torch.ops.halftone.greedy.default


def greedy(logits: Tensor) -> Tensor:
    """float32 [rows, vocab] -> int64 [rows]: the first of the largest; -1 where an infinity or NaN is."""
    token_ids: Tensor = _greedy(logits)
    return token_ids
