"""A greedy step on CUDA: the likeliest token of each chunk of the vocabulary, then of the chunks."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, cdiv, launch, next_power_of_2

CHUNK = 4096  # tokens of one program: 32 programs a row of 128k


@triton.jit  # type: ignore[untyped-decorator]
def likeliest_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # any float [rows, vocab]
    highest_ptr,  # float32 [rows, chunks]
    token_ids_ptr,  # int32 [rows, chunks]
    vocab,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Each chunk's largest logit and the first token that has it, -1 where some logit is not finite."""
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token_ids < vocab
    logits = tl.load(logits_ptr + row * vocab + token_ids, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(logits) < float("inf")
    num_broken = tl.sum(tl.where(finite, 0, 1), 0)
    logits = tl.where(finite & inside, logits, float("-inf"))
    highest = tl.max(logits, 0)
    first = tl.min(tl.where(logits == highest, token_ids, vocab), 0)
    place = row * tl.num_programs(1) + chunk
    tl.store(highest_ptr + place, highest)
    tl.store(token_ids_ptr + place, tl.where(num_broken > 0, -1, first))


@triton.jit  # type: ignore[untyped-decorator]
def likeliest_of_chunks(  # type: ignore[no-untyped-def]
    highest_ptr, token_ids_ptr, row, CHUNKS: tl.constexpr, PADDED: tl.constexpr
):
    """-> a row's largest logit and its first token, -1 where a chunk is broken."""
    chunks = tl.arange(0, PADDED)
    inside = chunks < CHUNKS
    values = tl.load(highest_ptr + row * CHUNKS + chunks, mask=inside, other=float("-inf"))
    token_ids = tl.load(token_ids_ptr + row * CHUNKS + chunks, mask=inside, other=0)
    highest = tl.max(values, 0)
    is_broken = tl.min(token_ids, 0) < 0
    first = tl.min(tl.where((values == highest) & inside, token_ids, 0x7FFFFFFF), 0)
    return highest, tl.where(is_broken, -1, first)


@triton.jit  # type: ignore[untyped-decorator]
def greedy_kernel(  # type: ignore[no-untyped-def]
    highest_ptr,
    token_ids_ptr,
    out_ptr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    _, token_id = likeliest_of_chunks(highest_ptr, token_ids_ptr, row, CHUNKS, PADDED)
    tl.store(out_ptr + row, token_id.to(tl.int64))


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, vocab], contiguous -> float32 and int32 [rows, chunks]: what `likeliest_kernel` finds."""
    rows, vocab = logits.shape
    chunks = cdiv(vocab, CHUNK)
    highest = logits.new_empty(rows, chunks, dtype=torch.float32)
    token_ids = logits.new_empty(rows, chunks, dtype=torch.int32)
    launch(likeliest_kernel, (rows, chunks), (logits, highest, token_ids), (vocab,), (CHUNK,))
    return highest, token_ids


def greedy(logits: Tensor) -> Tensor:
    """See the package."""
    highest, token_ids = likeliest(logits.contiguous())
    rows, chunks = highest.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    constants = (chunks, next_power_of_2(chunks))
    launch(greedy_kernel, (rows,), (highest, token_ids, out), (), constants, num_warps=1)
    return out
