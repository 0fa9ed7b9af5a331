"""One token a row, drawn from the softmax of its logits at its temperature. Source: inverse of the CDF.

decoder --logits [rows, vocab]--> sample --token ids--> runner, for a step in which no row filters

It looks at nothing on the host, so that it can be captured. A row's token depends on its own logits,
temperature and random number; between devices it can differ where that number falls within rounding of the
border of two tokens.
"""

import torch
from torch import Tensor

from service.kernels.sample import reference
from service.kernels.sample.reference import pick, scaled

__all__ = ["pick", "sample", "scaled"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define(
    "sample(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor sample_indices) "
    "-> Tensor"
)
library.impl("sample", reference.sample, "CompositeExplicitAutograd")

if torch.cuda.is_available():
    from service.kernels.sample import triton as cuda

    library.impl("sample", cuda.sample, "CUDA")

_sample = torch.ops.halftone.sample.default


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    """[rows, vocab], any float type -> int64 [rows], -1 for a row with an infinity or NaN.

    `temperature` float32 [rows], 0 for the likeliest; `seeds`, `positions` and `sample_indices` int64 [rows].
    A token that must not be drawn has the lowest finite logit.
    """
    token_ids: Tensor = _sample(logits, temperature, seeds, positions, sample_indices)
    return token_ids
