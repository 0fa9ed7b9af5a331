"""The Triton kernels of attention in their interpreter against the definition, over ragged batches."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from service.kernels.paged_attention import decode_plan, plan_attention
from service.kernels.paged_attention.reference import paged_attention_reference
from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import Pages, relative_rms

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # relative RMS
NO_WINDOW, NO_CAP = 0, 0.0


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.paged_attention.triton") as module:
        yield module


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype", "window", "softcap", "splits"),
    [
        (2, 4, 64, torch.float16, NO_WINDOW, NO_CAP, 1),
        (1, 3, 64, torch.float32, NO_WINDOW, NO_CAP, 4),
        (1, 1, 80, torch.float32, 40, NO_CAP, 2),
        (2, 2, 96, torch.bfloat16, NO_WINDOW, 5.0, 2),
        (1, 20, 16, torch.float32, 7, 2.0, 8),  # more heads in a group than a tile's least rows
        (1, 4, 256, torch.bfloat16, 33, NO_CAP, 1),
        (1, 4, 128, torch.float16, NO_WINDOW, NO_CAP, 32),  # most splits are empty
    ],
)
def test_decode_equals_reference(
    kernels: ModuleType,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
    splits: int,
) -> None:
    lengths = [1, 16, 65, 200]
    pages = Pages(lengths, kv_heads, head_dim, dtype, seed=splits)
    q = torch.randn(len(lengths), kv_heads * group, head_dim).to(dtype)
    out = torch.full_like(q, float("nan"))
    plan = decode_plan(pages.tables, torch.tensor(lengths, dtype=torch.int32))
    kernels.decode(q, pages.keys, pages.values, plan, out, head_dim**-0.5, window, softcap, splits)
    rows = list(range(len(lengths) + 1))
    want = paged_attention_reference(
        q, pages.keys, pages.values, pages.tables, rows, lengths, head_dim**-0.5, window, softcap
    )
    assert relative_rms(out, want) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype", "window", "softcap"),
    [
        (2, 4, 64, torch.float16, NO_WINDOW, NO_CAP),
        (1, 3, 64, torch.float32, NO_WINDOW, NO_CAP),
        (1, 1, 80, torch.float32, 40, NO_CAP),
        (1, 2, 96, torch.bfloat16, NO_WINDOW, 5.0),
        (1, 5, 16, torch.float32, 7, 2.0),
        (1, 4, 256, torch.bfloat16, 33, NO_CAP),
    ],
)
@pytest.mark.parametrize("short", [0, 2048], ids=["long tiles", "short tiles"])
def test_mixed_batch_equals_reference(
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    short: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    window: int,
    softcap: float,
) -> None:
    """Decode rows, whole prompts, chunks behind a cached prefix; some end one query behind a tile."""
    monkeypatch.setattr(kernels, "SHORT_PROMPT_TOKENS", short)
    lengths, chunks = [5, 90, 65, 130, 33, 3], [1, 1, 65, 41, 2, 3]
    pages = Pages(lengths, kv_heads, head_dim, dtype, seed=head_dim)
    starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
    q = torch.randn(starts[-1], kv_heads * group, head_dim).to(dtype)
    plan = plan_attention(pages.tables, starts, lengths, 2)
    got = kernels.paged_attention(
        q, pages.keys, pages.values, plan, head_dim**-0.5, window=window, softcap=softcap
    )
    want = paged_attention_reference(
        q, pages.keys, pages.values, pages.tables, starts, lengths, head_dim**-0.5, window, softcap
    )
    assert got.dtype == dtype
    assert relative_rms(got, want) < TOLERANCE[dtype]


def test_padded_rows_are_harmless(kernels: ModuleType) -> None:
    """Length 0 reads no page, which may hold anything, and gives zeros; its neighbours do not notice."""
    pages = Pages([40], 1, 64, torch.float32, seed=1)
    q = torch.randn(2, 4, 64)
    tables = torch.cat((torch.zeros_like(pages.tables), pages.tables))
    pages.keys[0] = pages.values[0] = float("nan")
    for splits in (1, 4):
        out = torch.full_like(q, float("nan"))
        plan = decode_plan(tables, torch.tensor([0, 40], dtype=torch.int32))
        kernels.decode(q, pages.keys, pages.values, plan, out, 0.125, 0, 0.0, splits)
        assert torch.equal(out[0], torch.zeros(4, 64))
        want = paged_attention_reference(q[1:], pages.keys, pages.values, pages.tables, [0, 1], [40], 0.125)
        assert relative_rms(out[1:], want) < TOLERANCE[torch.float32]


def test_splits_fill_the_machine_and_no_more(kernels: ModuleType) -> None:
    def splits(rows: int, kv_heads: int, max_tokens: int) -> int:
        found: int = kernels.splits_of(rows, kv_heads, max_tokens, 64)
        return found

    assert [splits(rows, 8, 8192) for rows in (1, 2, 16, 64, 256)] == [32, 32, 4, 1, 1]
    assert splits(1, 8, 640) == 8  # no more than there are tiles
    assert splits(1, 8, 16) == 1
