"""One token a row, drawn as `sample` draws it, from the likeliest tokens that the row's filters keep.

decoder --logits [rows, vocab]--> sample_likely --token ids--> sampler, where some row may filter

Filters follow temperature: top-k, then top-p of the mass that top-k left (Holtzman et al., arXiv 1904.09751:
the fewest tokens that reach it), then min-p of the likeliest token's probability (arXiv 2407.01082). Between
equal logits the lower token id comes first. A row's token depends on that row alone, and where no filter is
on it is `sample`'s. Nothing looks at a value on the host, so that it can be captured; between devices what is
kept can differ where a mass falls within rounding of its target.
"""

import torch
from torch import Tensor

from service.kernels.sample_likely import reference
from service.kernels.sample_likely.reference import kept

__all__ = ["kept", "sample_likely"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define(
    "sample_likely(Tensor logits, Tensor temperature, Tensor seeds, Tensor positions, Tensor sample_indices, "
    "Tensor top_k, Tensor top_p, Tensor min_p) -> Tensor"
)
library.impl("sample_likely", reference.sample_likely, "CompositeExplicitAutograd")

if torch.cuda.is_available():
    from service.kernels.sample_likely import triton as cuda

    library.impl("sample_likely", cuda.sample_likely, "CUDA")

_sample_likely = torch.ops.halftone.sample_likely.default


def sample_likely(
    logits: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    positions: Tensor,
    sample_indices: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """float32 [rows, vocab] -> int64 [rows], -1 for a row with an infinity or NaN.

    `temperature` float32 [rows], 0 for the likeliest; `seeds`, `positions` and `sample_indices` int64 [rows];
    `top_k` any int [rows], 0 is off; `top_p` and `min_p` float64 [rows], 1 and 0 are off. A token that must
    not be drawn has the lowest finite logit.
    """
    token_ids: Tensor = _sample_likely(
        logits, temperature, seeds, positions, sample_indices, top_k, top_p, min_p
    )
    return token_ids
