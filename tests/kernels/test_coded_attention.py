"""Attention over 8-bit codes, Triton's and the CPU's, against the definition over what they mean."""

from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from service.kernels.coded_attention import coded_attention, coded_attention_kernel, workspace_bytes
from service.kernels.paged_attention import PromptTiles, decode_plan, mixed_plan, plan_attention
from service.kernels.paged_attention import plan as plans
from tests.kernels.coded_pages import CodedPages
from tests.kernels.interpreter import interpreted
from tests.kernels.test_paged_attention import relative_rms

# of the rounding of queries, weights and result; codes are exact on both sides
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
INT8, FP8 = torch.int8, torch.float8_e4m3fn
CODES = pytest.mark.parametrize("codes", [INT8, FP8], ids=str)
LENGTHS, CHUNKS, NUM_DECODE = [5, 90, 65, 130, 33, 3], [1, 1, 65, 41, 2, 3], 2


@pytest.fixture(scope="module")
def kernels() -> Iterator[ModuleType]:
    with interpreted("service.kernels.coded_attention.triton") as module:
        yield module


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype", "codes", "window", "softcap", "splits"),
    [
        (2, 4, 64, torch.float16, INT8, 0, 0.0, 1),
        (1, 3, 64, torch.float32, FP8, 0, 0.0, 4),
        (1, 1, 80, torch.float16, INT8, 40, 0.0, 2),
        (2, 2, 96, torch.bfloat16, FP8, 0, 5.0, 2),
        (1, 20, 16, torch.float32, INT8, 7, 2.0, 8),  # more heads in a group than a tile's least rows
        (1, 4, 256, torch.bfloat16, INT8, 33, 0.0, 1),
        (1, 4, 128, torch.float16, FP8, 0, 0.0, 32),  # most splits are empty
    ],
)
@pytest.mark.parametrize("wild", [False, True])
def test_decode_equals_reference(
    kernels: ModuleType,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    codes: torch.dtype,
    window: int,
    softcap: float,
    splits: int,
    wild: bool,
) -> None:
    lengths = [1, 16, 65, 200]
    pages = CodedPages(lengths, kv_heads, head_dim, dtype, codes, splits, wild)
    q = torch.randn(len(lengths), kv_heads * group, head_dim).to(dtype)
    out = torch.full_like(q, float("nan"))
    plan = decode_plan(pages.tables, torch.tensor(lengths, dtype=torch.int32))
    kernels.decode(
        q, pages.keys, pages.values, pages.scales, plan, out, head_dim**-0.5, window, softcap, splits
    )
    want = pages.reference(q, list(range(len(lengths) + 1)), lengths, window, softcap)
    for row in range(len(lengths)):
        assert relative_rms(out[row], want[row]) < TOLERANCE[dtype]


SHAPES = pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "dtype", "codes", "window", "softcap"),
    [
        (2, 4, 64, torch.float16, INT8, 0, 0.0),
        (1, 3, 64, torch.float32, FP8, 0, 0.0),
        (1, 1, 80, torch.float16, FP8, 40, 0.0),
        (1, 2, 96, torch.bfloat16, INT8, 0, 5.0),
        (1, 5, 16, torch.float32, INT8, 7, 2.0),
        (1, 4, 256, torch.bfloat16, FP8, 33, 0.0),
    ],
)


@SHAPES
@pytest.mark.parametrize("wild", [False, True])
@pytest.mark.parametrize("copied_tokens", [0, sum(LENGTHS[NUM_DECODE:])], ids=["in_place", "copied"])
def test_mixed_batch_equals_reference(
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    copied_tokens: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    dtype: torch.dtype,
    codes: torch.dtype,
    window: int,
    softcap: float,
    wild: bool,
) -> None:
    """Decode rows, whole prompts, chunks behind a cached prefix; some end one query behind a tile."""
    pages = CodedPages(LENGTHS, kv_heads, head_dim, dtype, codes, head_dim, wild)
    starts = [sum(CHUNKS[:i]) for i in range(len(CHUNKS) + 1)]
    q = torch.randn(starts[-1], kv_heads * group, head_dim).to(dtype)
    want = pages.reference(q, starts, LENGTHS, window, softcap)
    monkeypatch.setattr(plans, "COPIED_TOKENS", copied_tokens)
    for attention in (kernels.coded_attention, coded_attention):
        plan = plan_attention(pages.tables, starts, LENGTHS, NUM_DECODE)
        got = attention(
            q, pages.keys, pages.values, pages.scales, plan, head_dim**-0.5, window=window, softcap=softcap
        )
        assert got.dtype == dtype
        # a CPU rounds what codes mean to bfloat16, and its weights too
        is_rounded = attention is coded_attention and dtype == torch.bfloat16
        assert relative_rms(got, want) < TOLERANCE[dtype] * (3 if is_rounded else 1)


@CODES
def test_captured_steps_are_those_of_any_prompts(kernels: ModuleType, codes: torch.dtype) -> None:
    """One plan for several steps, whose pages have places left over."""
    num_decode, num_prompts, num_rows = 2, 3, 96
    nobody = num_decode + num_prompts
    tiles = PromptTiles(num_rows, num_prompts, nobody, False, torch.device("cpu"), num_pages=16)
    tables = torch.zeros(nobody + 1, 12, dtype=torch.int32)
    told_lengths, told_starts = (torch.zeros(nobody + more, dtype=torch.int32) for more in (1, 2))
    plan = mixed_plan(tables, told_lengths, told_starts, num_decode, tiles)
    for seed, (lengths, chunks) in enumerate((([5, 90, 130], [1, 60, 9]), ([33, 3], [33, 3]), ([7], [1]))):
        count = sum(chunk == 1 for chunk in chunks)
        prompts = range(num_decode, num_decode + len(chunks) - count)
        pages = CodedPages(lengths, 1, 64, torch.float32, codes, seed)
        starts = [sum(chunks[:i]) for i in range(len(chunks) + 1)]
        tables.zero_(), told_lengths.zero_()
        tables[[*range(count), *prompts], : pages.tables.shape[1]] = pages.tables
        told_lengths[[*range(count), *prompts]] = torch.tensor(lengths, dtype=torch.int32)
        told_starts[num_decode:] = starts[-1]
        told_starts[prompts.start : prompts.stop] = torch.tensor(starts[count:-1], dtype=torch.int32)
        q = torch.randn(num_rows, 2, 64)
        out = torch.full_like(q, 7.0)
        for _ in range(2):  # kernels ask for their tables by the first
            tiles.fill(num_decode, chunks[count:], lengths[count:])
            kernels.coded_attention(q, pages.keys, pages.values, pages.scales, plan, 0.125, out=out)
        want = pages.reference(q[: starts[-1]], starts, lengths)
        assert relative_rms(out[: starts[-1]], want) < TOLERANCE[torch.float32]
        assert (out[max(starts[-1], num_decode) :] == 7.0).all()


@CODES
def test_what_a_prompt_says_does_not_depend_on_the_way_its_codes_take(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, codes: torch.dtype
) -> None:
    """Sums in float32 alone differ, of codes copied and read in place, of a prompt whole and cut."""
    length = 90
    pages = CodedPages([length], 1, 64, torch.float32, codes, seed=4, wild=True)
    q = torch.randn(length, 4, 64)
    want = pages.reference(q, [0, length], [length])
    for copied_tokens in (50, length):
        monkeypatch.setattr(plans, "COPIED_TOKENS", copied_tokens)
        for cuts in ([0, length], [0, 1, 38, 65, length]):
            parts = []
            for begin, stop in pairwise(cuts):
                plan = plan_attention(pages.tables, [0, stop - begin], [stop], 0)
                caches = pages.keys, pages.values, pages.scales
                parts.append(kernels.coded_attention(q[begin:stop].contiguous(), *caches, plan, 0.125))
            assert relative_rms(torch.cat(parts), want) < TOLERANCE[torch.float32]


@CODES
@pytest.mark.parametrize("copied_tokens", [0, 3], ids=["in_place", "copied"])
def test_small_values_keep_their_digits(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, copied_tokens: int, codes: torch.dtype
) -> None:
    """The first query sees one token alone, with a scale below float16's normal numbers."""
    pages = CodedPages([3], 1, 64, torch.float16, codes, seed=6, wild=True)
    q = torch.randn(3, 4, 64).to(torch.float16)
    monkeypatch.setattr(plans, "COPIED_TOKENS", copied_tokens)
    plan = plan_attention(pages.tables, [0, 3], [3], 0)
    got = kernels.coded_attention(q, pages.keys, pages.values, pages.scales, plan, 0.125)
    want = pages.reference(q, [0, 3], [3])
    for row in range(3):
        assert relative_rms(got[row], want[row]) < TOLERANCE[torch.float16]


@CODES
def test_large_queries_in_bfloat16(kernels: ModuleType, codes: torch.dtype) -> None:
    """Beyond float16, and some so small that float16 has no normal number for them."""
    lengths = [70, 70, 70]
    pages = CodedPages(lengths, 1, 64, torch.bfloat16, codes, seed=2)
    q = (torch.randn(3, 4, 64) * torch.tensor([1e6, 1e-8, 0.0])[:, None, None]).to(torch.bfloat16)
    out = torch.full_like(q, float("nan"))
    plan = decode_plan(pages.tables, torch.tensor(lengths, dtype=torch.int32))
    kernels.decode(q, pages.keys, pages.values, pages.scales, plan, out, 1.0, 0, 0.0)
    want = pages.reference(q.float() * 8, [0, 1, 2, 3], lengths)
    for row in range(3):
        assert relative_rms(out[row], want[row]) < TOLERANCE[torch.bfloat16]
    prompts = plan_attention(pages.tables, [0, 1, 2, 3], lengths, 0)
    got = kernels.coded_attention(q, pages.keys, pages.values, pages.scales, prompts, 1.0)
    for row in range(3):
        assert relative_rms(got[row], want[row]) < TOLERANCE[torch.bfloat16]


@CODES
def test_padded_rows_are_harmless(kernels: ModuleType, codes: torch.dtype) -> None:
    """Length 0 reads no page and gives zeros; its neighbours do not notice."""
    pages = CodedPages([40], 1, 64, torch.float32, codes, seed=1)
    q = torch.randn(2, 4, 64)
    tables = torch.cat((torch.zeros_like(pages.tables), pages.tables))
    for splits in (1, 4):
        out = torch.full_like(q, float("nan"))
        plan = decode_plan(tables, torch.tensor([0, 40], dtype=torch.int32))
        kernels.decode(q, pages.keys, pages.values, pages.scales, plan, out, 0.125, 0, 0.0, splits)
        assert torch.equal(out[0], torch.zeros(4, 64))
        assert relative_rms(out[1:], pages.reference(q[1:], [0, 1], [40])) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("part", [0, 1], ids=["key", "value"])
def test_a_broken_token_is_seen(kernels: ModuleType, part: int) -> None:
    """By whoever attends to it, and by nobody else."""
    pages = CodedPages([20, 20], 1, 64, torch.float16, INT8, seed=1)
    pages.scales[pages.tables[0, 0].long(), 0, 3, part] = torch.nan
    q = torch.randn(2, 4, 64).to(torch.float16)
    out = torch.zeros_like(q)
    plan = decode_plan(pages.tables, torch.tensor([20, 20], dtype=torch.int32))
    kernels.decode(q, pages.keys, pages.values, pages.scales, plan, out, 0.125, 0, 0.0)
    prompts = plan_attention(pages.tables, [0, 1, 2], [20, 20], 0)
    for got in (out, kernels.coded_attention(q, pages.keys, pages.values, pages.scales, prompts, 0.125)):
        assert bool(got[0].isnan().all())
        assert bool(got[1].isfinite().all())


@CODES
@pytest.mark.parametrize("window", [0, 70])
def test_deterministic_rows_are_the_same_in_every_company(
    kernels: ModuleType, window: int, codes: torch.dtype
) -> None:
    """Decoding beside longer ones, and a prompt however it is cut."""
    lengths = [5, 256, 300, 700, 40]
    pages = CodedPages(lengths, 1, 64, torch.float16, codes, seed=3)
    q = torch.randn(len(lengths), 4, 64).to(torch.float16)

    def decoded(rows: list[int], width: int) -> torch.Tensor:
        out = torch.full_like(q[rows], float("nan"))
        told = torch.tensor([lengths[row] for row in rows], dtype=torch.int32)
        plan = decode_plan(pages.tables[rows, :width].contiguous(), told, deterministic=True)
        kernels.decode(q[rows], pages.keys, pages.values, pages.scales, plan, out, 0.125, window, 0.0)
        return out

    together = decoded([0, 1, 2, 3, 4], pages.tables.shape[1])
    want = pages.reference(q, [0, 1, 2, 3, 4, 5], lengths, window)
    assert relative_rms(together, want) < TOLERANCE[torch.float16]
    for row, length in enumerate(lengths):
        assert torch.equal(decoded([row], -(-length // 16))[0], together[row])

    length = 150
    pages = CodedPages([length], 1, 64, torch.float16, codes, seed=5)
    q = torch.randn(length, 4, 64).to(torch.float16)

    def attended(cuts: list[int]) -> torch.Tensor:
        parts = []
        for start, stop in pairwise(cuts):
            plan = plan_attention(pages.tables, [0, stop - start], [stop], 0, deterministic=True)
            parts.append(
                kernels.coded_attention(
                    q[start:stop].contiguous(), pages.keys, pages.values, pages.scales, plan, 0.125, window
                )
            )
        return torch.cat(parts)

    whole = attended([0, length])
    assert relative_rms(whole, pages.reference(q, [0, length], [length], window)) < TOLERANCE[torch.float16]
    assert torch.equal(attended([0, 1, 38, 64, 65, 129, length]), whole)


def test_only_a_gpu_takes_a_workspace() -> None:
    assert workspace_bytes(8, 128, torch.float16, torch.device("cpu")) == 0


def test_the_name_says_that_a_cpu_dequantizes() -> None:
    name = coded_attention_kernel(torch.float32, torch.device("cpu"), 64, 3)
    assert name == "torch dequantizes pages, torch.scaled_dot_product_attention"
    cuda = torch.device("cuda")
    assert coded_attention_kernel(torch.float16, cuda, 64, 3) == "triton.coded_attention"
