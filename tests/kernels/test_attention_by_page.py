"""Attention of a deterministic plan on a CPU: near the definition, and the same bits in every company."""

from itertools import pairwise

import pytest
import torch

from service.kernels.paged_attention import paged_attention, plan_attention
from service.kernels.paged_attention.reference import paged_attention_reference
from tests.kernels.test_paged_attention import Pages, relative_rms

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
CASES = pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype", "window", "softcap"),
    [
        (2, 2, 16, torch.float32, 0, 0.0),
        (1, 3, 80, torch.float32, 40, 0.0),
        (2, 1, 64, torch.float16, 0, 5.0),
        (1, 4, 64, torch.bfloat16, 0, 0.0),  # served in C where that is possible
        (1, 2, 96, torch.bfloat16, 33, 0.0),  # there decode alone is
        (2, 2, 16, torch.bfloat16, 7, 0.0),
    ],
)
LENGTHS, CHUNKS, NUM_DECODE = [5, 90, 16, 130, 33, 3], [1, 1, 1, 41, 2, 3], 3


def attended(
    pages: Pages,
    q: torch.Tensor,
    sequences: list[int],
    chunks: list[int],
    lengths: list[int],
    num_decode: int,
    window: int,
    softcap: float,
) -> torch.Tensor:
    starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    tables = pages.tables[sequences, : -(-max(lengths) // 16)].contiguous()
    plan = plan_attention(tables, starts, lengths, num_decode, deterministic=True)
    return paged_attention(q, pages.keys, pages.values, plan, q.shape[-1] ** -0.5, window, softcap)


@CASES
def test_mixed_batch_equals_reference_and_each_sequence_alone(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, window: int, softcap: float
) -> None:
    pages = Pages(LENGTHS, kv_heads, head_dim, dtype, seed=head_dim)
    starts = [sum(CHUNKS[:i]) for i in range(len(CHUNKS) + 1)]
    q = torch.randn(starts[-1], kv_heads * group, head_dim).to(dtype)
    together = attended(pages, q, list(range(6)), CHUNKS, LENGTHS, NUM_DECODE, window, softcap)
    want = paged_attention_reference(
        q, pages.keys, pages.values, pages.tables, starts, LENGTHS, head_dim**-0.5, window, softcap
    )
    assert together.dtype == dtype
    assert relative_rms(together, want) < TOLERANCE[dtype]
    for sequence, (first, end) in enumerate(pairwise(starts)):
        is_decode = int(sequence < NUM_DECODE)
        alone = attended(
            pages, q[first:end].contiguous(), [sequence], [end - first], [LENGTHS[sequence]], is_decode,
            window, softcap,
        )  # fmt: skip
        assert torch.equal(alone, together[first:end])


@CASES
def test_a_query_is_the_same_however_its_prompt_is_cut(
    kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, window: int, softcap: float
) -> None:
    """Keys behind a chunk's end are not written yet: they may be NaN."""
    length = 100
    pages = Pages([length], kv_heads, head_dim, dtype, seed=1)
    q = torch.randn(length, kv_heads * group, head_dim).to(dtype)
    whole = attended(pages, q, [0], [length], [length], 0, window, softcap)
    written = pages.keys.clone(), pages.values.clone()
    parts = []
    for start, stop in pairwise([0, 1, 30, 48, 49, 97, length]):
        block, offset = int(pages.tables[0, (stop - 1) // 16]), stop % 16 or 16
        for cache, content in zip((pages.keys, pages.values), written, strict=True):
            cache.copy_(content)
            cache[block, :, offset:] = float("nan")
        chunk = q[start:stop].contiguous()
        parts.append(attended(pages, chunk, [0], [stop - start], [stop], 0, window, softcap))
    assert torch.equal(torch.cat(parts), whole)
