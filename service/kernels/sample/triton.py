"""A draw on CUDA in three passes: the largest logit of each chunk, the mass of each, the chunk hit.

`kernels/sample_likely` passes the last two the limits of what each row's filters keep.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.greedy.triton import CHUNK, likeliest, likeliest_of_chunks
from service.kernels.launch import await_predecessor, launch, next_power_of_2
from service.kernels.sample.reference import MIN_TEMPERATURE

# parameters of a row are columns of one matrix, which is not to be compiled for
COLUMNS = ["temperature_ptr", "seeds_ptr", "positions_ptr", "sample_indices_ptr"]
STRIDES = ["temperature_stride", "seed_stride", "position_stride", "index_stride"]


@triton.jit
def scaled_logits(  # type: ignore[no-untyped-def]
    logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature
):
    """-> logits less the largest over temperature, divided as a CPU does; -inf behind the vocabulary."""
    logits = tl.load(logits_ptr + row * vocab + token_ids, mask=token_ids < vocab, other=float("-inf"))
    return tl.div_rn(logits.to(tl.float32) - highest, tl.maximum(temperature, min_temperature))


@triton.jit  # type: ignore[untyped-decorator]
def kept_weights(  # type: ignore[no-untyped-def]
    scaled, token_ids, least_ptr, last_ptr, row, LIMITED: tl.constexpr
):
    """-> exponentials, 0 for what lies under the row's limit."""
    weights = tl.exp(scaled)
    if LIMITED:
        least = tl.load(least_ptr + row)
        is_kept = (scaled > least) | ((scaled == least) & (token_ids <= tl.load(last_ptr + row)))
        weights = tl.where(is_kept, weights, 0.0)
    return weights.to(tl.float64)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=STRIDES, do_not_specialize_on_alignment=COLUMNS
)
def mass_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # any float [rows, vocab]
    temperature_ptr,  # float32 [rows]
    highest_ptr,  # float32 [rows, CHUNKS]
    token_ids_ptr,  # int32 [rows, CHUNKS]
    masses_ptr,  # float64 [rows, CHUNKS]
    least_ptr,  # float32 [rows], the least scaled logit that is kept
    last_ptr,  # int32 [rows], the last token that is kept of those at the least
    temperature_stride,
    vocab,
    min_temperature,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    LIMITED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Each chunk's sum of exponentials; nothing for a row that does not draw."""
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    if temperature > 0:
        highest, _ = likeliest_of_chunks(highest_ptr, token_ids_ptr, row, CHUNKS, PADDED)
        token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
        scaled = scaled_logits(logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature)
        weights = kept_weights(scaled, token_ids, least_ptr, last_ptr, row, LIMITED)
        tl.store(masses_ptr + row * CHUNKS + chunk, tl.sum(weights, 0))


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=STRIDES, do_not_specialize_on_alignment=COLUMNS
)
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    seeds_ptr,  # int64 [rows]
    positions_ptr,  # any int [rows]
    sample_indices_ptr,  # any int [rows]
    highest_ptr,
    token_ids_ptr,
    masses_ptr,
    least_ptr,
    last_ptr,
    out_ptr,  # int64 [rows]
    temperature_stride,
    seed_stride,
    position_stride,
    index_stride,
    vocab,
    min_temperature,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    LIMITED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    highest, token_id = likeliest_of_chunks(highest_ptr, token_ids_ptr, row, CHUNKS, PADDED)
    if (temperature > 0) & (token_id >= 0):
        # the first word of Philox4x32-10, as kernels/philox has it
        position = tl.load(positions_ptr + row * position_stride).to(tl.uint32)
        sample_index = tl.load(sample_indices_ptr + row * index_stride).to(tl.uint32)
        zero = sample_index ^ sample_index
        seed = tl.load(seeds_ptr + row * seed_stride)
        word, _, _, _ = tl.philox(seed, position, sample_index, zero, zero)
        share = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2 to the -32
        chunks = tl.arange(0, PADDED)
        masses = tl.load(masses_ptr + row * CHUNKS + chunks, mask=chunks < CHUNKS, other=0.0)
        target = share * tl.sum(masses, 0)
        hit = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), 0)
        before = tl.sum(tl.where(chunks < hit, masses, 0.0), 0)
        places = tl.arange(0, CHUNK)
        token_ids = hit * CHUNK + places
        scaled = scaled_logits(logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature)
        weights = kept_weights(scaled, token_ids, least_ptr, last_ptr, row, LIMITED)
        # the chunk's mass was added in another order: what rounding leaves over belongs to its last token
        last = tl.max(tl.where(weights > 0, places, 0), 0)
        place = tl.sum((before + tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
        token_id = hit * CHUNK + tl.minimum(place, last)
    tl.store(out_ptr + row, token_id.to(tl.int64))


def sample(
    logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, sample_indices: Tensor
) -> Tensor:
    """See the package."""
    logits = logits.contiguous()
    return draw(logits, temperature, (seeds, positions, sample_indices), likeliest(logits), None)


def draw(
    logits: Tensor,
    temperature: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    highest: tuple[Tensor, Tensor],
    limits: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """From `highest`, what `likeliest` finds in `logits`, on; `limits` as the kernels' `least` and `last`."""
    rows, vocab = logits.shape
    chunks = highest[0].shape[1]
    masses = torch.empty(rows, chunks, dtype=torch.float64, device=logits.device)
    numbers = (vocab, MIN_TEMPERATURE)
    constants = (chunks, next_power_of_2(chunks), CHUNK, limits is not None)
    found = (*highest, masses, *(limits or highest))
    stride = temperature.stride(0)
    launch(mass_kernel, (rows, chunks), (logits, temperature, *found), (stride, *numbers), constants)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    drawing = (logits, temperature, *keys, *found, out)
    strides = (stride, *[key.stride(0) for key in keys])
    launch(draw_kernel, (rows,), drawing, (*strides, *numbers), constants, num_warps=8)
    return out
