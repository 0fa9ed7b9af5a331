"""Penalties and biases on CUDA: a program for each chunk of a row, which ends at once where nobody asks."""

import triton
import triton.language as tl
from torch import Tensor

from service.kernels.launch import await_predecessor, cdiv, launch, next_power_of_2

CHUNK = 4096  # tokens of one program: 32 programs a row of 128k
NUM_FACTORS = 4


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])  # type: ignore[untyped-decorator]
def penalty_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # float32 [n, vocab]
    rows_ptr,  # int32 [n]
    occurrences_ptr,  # int32 [rows, width]
    factors_ptr,  # float32 [rows, FACTORS]
    vocab,
    width,
    FACTORS: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    factors = factors_ptr + row * FACTORS
    if tl.load(factors + 3) > 0:
        repetition, frequency, presence = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
        token_ids = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = token_ids < vocab
        seen = tl.load(occurrences_ptr + row * width + token_ids, mask=inside, other=0)
        logits = tl.load(logits_ptr + place * vocab + token_ids, mask=inside, other=0.0)
        counts = (seen >> 1).to(tl.float32)
        repeated = tl.where(logits > 0, logits / repetition, logits * repetition)
        shaped = tl.where(seen > 0, repeated, logits) - frequency * counts
        shaped -= tl.where(counts > 0, presence, 0.0)
        tl.store(logits_ptr + place * vocab + token_ids, shaped, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])  # type: ignore[untyped-decorator]
def bias_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    rows_ptr,
    factors_ptr,
    bias_ids_ptr,  # int64 [rows, places]
    biases_ptr,  # float32 [rows, places]
    vocab,
    places,
    FACTORS: tl.constexpr,
    PADDED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place).to(tl.int64)
    if tl.load(factors_ptr + row * FACTORS + 3) > 0:
        number = tl.arange(0, PADDED)
        biases = tl.load(biases_ptr + row * places + number, mask=number < places, other=0.0)
        token_ids = tl.load(bias_ids_ptr + row * places + number, mask=number < places, other=0)
        used = biases != 0
        logits = tl.load(logits_ptr + place * vocab + token_ids, mask=used, other=0.0)
        tl.store(logits_ptr + place * vocab + token_ids, logits + biases, mask=used)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])  # type: ignore[untyped-decorator]
def count_kernel(  # type: ignore[no-untyped-def]
    occurrences_ptr,
    rows_ptr,
    factors_ptr,
    token_ids_ptr,  # int64 [n]
    width,
    FACTORS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    place = tl.program_id(0)
    row = tl.load(rows_ptr + place).to(tl.int64)
    token_id = tl.load(token_ids_ptr + place)
    if (tl.load(factors_ptr + row * FACTORS + 3) > 0) & (token_id >= 0):
        seen = occurrences_ptr + row * width + token_id
        tl.store(seen, tl.load(seen) + 2)


def shape_logits(
    logits: Tensor, rows: Tensor, occurrences: Tensor, factors: Tensor, bias_ids: Tensor, biases: Tensor
) -> None:
    """See the package."""
    assert logits.is_contiguous()
    num_rows, vocab = logits.shape
    places = bias_ids.shape[1]
    launch(
        penalty_kernel,
        (num_rows, cdiv(vocab, CHUNK)),
        (logits, rows, occurrences, factors),
        (vocab, occurrences.shape[1]),
        (NUM_FACTORS, CHUNK),
        num_warps=8,
    )
    tensors = (logits, rows, factors, bias_ids, biases)
    launch(bias_kernel, (num_rows,), tensors, (vocab, places), (NUM_FACTORS, next_power_of_2(places)))


def count_tokens(occurrences: Tensor, rows: Tensor, factors: Tensor, token_ids: Tensor) -> None:
    """See the package."""
    width = occurrences.shape[1]
    tensors = (occurrences, rows, factors, token_ids)
    launch(count_kernel, (len(rows),), tensors, (width,), (NUM_FACTORS,), num_warps=1)
