"""The Triton kernels of attention in their interpreter against the definition, over ragged batches."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from service.kernels.paged_attention import PromptTiles, decode_plan, mixed_plan, plan_attention
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


def test_captured_steps_are_those_of_any_prompts(kernels: ModuleType) -> None:
    """One plan for several steps, each with places left over; rows that nobody has keep what they held."""
    num_decode, num_prompts, num_rows, most_blocks = 3, 4, 96, 12
    nobody = num_decode + num_prompts
    tiles = PromptTiles(num_rows, num_prompts, nobody, is_long=False, device=torch.device("cpu"))
    tables = torch.zeros(nobody + 1, most_blocks, dtype=torch.int32)
    told_lengths, told_starts = (torch.zeros(nobody + more, dtype=torch.int32) for more in (1, 2))
    plan = mixed_plan(tables, told_lengths, told_starts, num_decode, tiles)
    steps = [([5, 90, 65, 130], [1, 1, 65, 9]), ([33, 3, 17], [33, 3, 16]), ([7, 150], [1, 90]), ([4], [1])]
    # kernels ask for their tables in the step that is captured, which is of padding
    kernels.paged_attention(torch.zeros(num_rows, 2, 64), *[torch.zeros(4, 1, 16, 64)] * 2, plan, 0.125)
    for seed, (lengths, chunks) in enumerate(steps):
        count = sum(chunk == 1 for chunk in chunks)
        pages = Pages(lengths, 1, 64, torch.float32, seed=seed)
        starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
        tables.zero_(), told_lengths.zero_()
        sequences = [*range(count), *range(num_decode, num_decode + len(chunks) - count)]
        tables[sequences, : pages.tables.shape[1]] = pages.tables
        told_lengths[sequences] = torch.tensor(lengths, dtype=torch.int32)
        told_starts[num_decode:] = starts[-1]
        told_starts[num_decode : num_decode + len(chunks) - count] = torch.tensor(starts[count:-1]).int()
        tiles.fill(num_decode, chunks[count:], lengths[count:])
        q = torch.randn(num_rows, 2, 64)
        out = torch.full_like(q, 7.0)
        kernels.paged_attention(q, pages.keys, pages.values, plan, 0.125, out=out)
        want = paged_attention_reference(
            q[: starts[-1]], pages.keys, pages.values, pages.tables, starts, lengths, 0.125
        )
        assert relative_rms(out[: starts[-1]], want) < TOLERANCE[torch.float32]
        assert (out[max(starts[-1], num_decode) :] == 7.0).all()


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
