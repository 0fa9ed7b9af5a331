"""Penalties and logit bias on the logits of a step, and the count of what was drawn. Both write in place.

engine/penalties --tables, a row a request--> shape_logits --logits--> sampler; drawn ids --> count_tokens

Repetition by Keskar et al. (arXiv 1909.05858), multiplying negative logits as Hugging Face does, over prompt
and answer; frequency and presence as OpenAI's API documents them, over the answer alone; then the biases. A
row that asks for nothing keeps its logits, bit for bit. Nothing looks at a value on the host, so that both
can be captured.
"""

import torch
from torch import Tensor

from service.kernels.shape_logits import reference
from service.kernels.shape_logits.reference import ASKS, GENERATED, IN_PROMPT, NEUTRAL

__all__ = ["ASKS", "GENERATED", "IN_PROMPT", "NEUTRAL", "count_tokens", "shape_logits"]

library = torch.library.Library("halftone", "FRAGMENT")
library.define(
    "shape_logits(Tensor(a!) logits, Tensor rows, Tensor occurrences, Tensor factors, Tensor bias_ids, "
    "Tensor biases) -> ()"
)
library.define("count_tokens(Tensor(a!) occurrences, Tensor rows, Tensor factors, Tensor token_ids) -> ()")
library.impl("shape_logits", reference.shape_logits, "CompositeExplicitAutograd")
library.impl("count_tokens", reference.count_tokens, "CompositeExplicitAutograd")

if torch.cuda.is_available():
    from service.kernels.shape_logits import triton as cuda

    library.impl("shape_logits", cuda.shape_logits, "CUDA")
    library.impl("count_tokens", cuda.count_tokens, "CUDA")

_shape_logits = torch.ops.halftone.shape_logits.default
_count_tokens = torch.ops.halftone.count_tokens.default


def shape_logits(
    logits: Tensor, rows: Tensor, occurrences: Tensor, factors: Tensor, bias_ids: Tensor, biases: Tensor
) -> None:
    """Changes float32 [n, vocab]; `rows` int32 [n] are those of the tables.

    `occurrences` int32 [rows, vocab or more], IN_PROMPT + GENERATED for each time in the answer; `factors`
    float32 [rows, 4], repetition, frequency, presence and whether the row asks; `bias_ids` int64 and `biases`
    float32 [rows, places], each id of a row once, unused places with bias 0.
    """
    _shape_logits(logits, rows, occurrences, factors, bias_ids, biases)


def count_tokens(occurrences: Tensor, rows: Tensor, factors: Tensor, token_ids: Tensor) -> None:
    """Adds GENERATED where rows that ask, int32 [n], drew `token_ids` int64 [n]; an id below 0 is none.

    A row that asks is named once.
    """
    _count_tokens(occurrences, rows, factors, token_ids)
