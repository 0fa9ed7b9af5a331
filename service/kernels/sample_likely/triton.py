"""What filters keep on CUDA: a row's limit, found in narrowing stretches, behind which `sample` draws.

likeliest --largest logit--> weigh, twice --a stretch--> collect --its tokens--> settle --limit--> draw

A token's depth is how far its scaled logit lies under the row's largest, at most DEEPEST, where nothing has
mass. What is kept ends at some depth, and at some token id among those of that depth. `weigh` adds up what
lies within each of EDGES depths, so that the next kernel knows between which two of them the end lies: a
stretch of some hundred or thousand tokens out of 128k, but for peculiar logits. `collect` lists its tokens,
and `settle` searches the list alone. Programs of a row that does not filter end at once. In which order sums
are added depends on the vocabulary alone, so neighbours change nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.greedy.triton import CHUNK, likeliest, likeliest_of_chunks
from service.kernels.launch import await_predecessor, launch, next_power_of_2
from service.kernels.sample.reference import MIN_TEMPERATURE
from service.kernels.sample.triton import draw, scaled_logits

ROUNDS = 2  # of weighing: each divides the stretch by about 15
EDGES = tl.constexpr(16)
NOWHERE = tl.constexpr(-0.01)  # a depth before all
DEEPEST = tl.constexpr(128.0)  # exp(-128) is 0 in float32
# relative; float32 sums of `weigh` are within 1e-5 of those in float64 that decide in the end
MARGIN = tl.constexpr(2e-5)
PIVOTS = tl.constexpr(16)  # depths that `settle` tries at a time
TILE = 1024  # tokens that it looks at at a time, as many columns of each chunk's list
ALL = tl.constexpr(0x7FFFFFFF)  # the last token id of any
NO_KEY = tl.constexpr(0x7FFFFFFFFFFFFFFF)
# of one matrix, as in `sample`
COLUMNS = ["temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"]
STRIDES = ["temperature_stride", "k_stride", "p_stride", "min_p_stride"]


@triton.jit
def filters(  # type: ignore[no-untyped-def]
    temperature_ptr, top_k_ptr, top_p_ptr, row, temperature_stride, k_stride, p_stride, vocab
):
    """-> temperature, top-k, top-p, whether the first is on, whether there is anything to search."""
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    top_k = tl.load(top_k_ptr + row * k_stride)
    top_p = tl.load(top_p_ptr + row * p_stride)
    is_counted = (top_k > 0) & (top_k < vocab)
    return temperature, top_k, top_p, is_counted, (temperature > 0) & (is_counted | (top_p < 1))


@triton.jit
def depths_of(  # type: ignore[no-untyped-def]
    logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature
):
    scaled = scaled_logits(logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature)
    return tl.minimum(tl.abs(scaled), DEEPEST)


@triton.jit  # type: ignore[untyped-decorator]
def stretch(  # type: ignore[no-untyped-def]
    edges_ptr,
    sums_ptr,
    first_sums_ptr,
    row,
    top_k,
    top_p,
    is_counted,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """-> depths `near` and `far`: what is kept ends behind the one and not behind the other."""
    numbers = tl.arange(0, EDGES)
    chunks = tl.arange(0, PADDED)
    at = (row * CHUNKS + chunks) * EDGES
    inside = chunks < CHUNKS
    sums = tl.sum(tl.load(sums_ptr + at[:, None] + numbers[None, :], mask=inside[:, None], other=0.0), 0)
    total = tl.sum(tl.load(first_sums_ptr + at + EDGES - 1, mask=inside, other=0.0), 0)
    target = tl.where(is_counted, top_k.to(tl.float32), top_p.to(tl.float32) * total)
    edges = tl.load(edges_ptr + row * EDGES + numbers)
    falls_short = (sums < target * (1 - MARGIN)) | (numbers == 0)
    reaches = (sums >= target * (1 + MARGIN)) | (numbers == EDGES - 1)
    near = tl.max(tl.where(falls_short, edges, NOWHERE), 0)
    far = tl.min(tl.where(reaches, edges, DEEPEST), 0)
    return near, far


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=COLUMNS)  # type: ignore[untyped-decorator]
def weigh_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # any float [rows, vocab]
    temperature_ptr,  # float32 [rows]
    top_k_ptr,  # any int [rows]
    top_p_ptr,  # float64 [rows]
    highest_ptr,  # float32 [rows, CHUNKS]
    token_ids_ptr,  # int32 [rows, CHUNKS]
    edges_ptr,  # float32 [rows, EDGES], depths from before what is kept can end to where it must have
    sums_ptr,  # float32 [rows, CHUNKS, EDGES], tokens or, without top-k, mass within them
    last_edges_ptr,  # of the round before
    last_sums_ptr,
    first_sums_ptr,  # of the first round
    temperature_stride,
    k_stride,
    p_stride,
    vocab,
    min_temperature,
    IS_FIRST: tl.constexpr,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature, top_k, top_p, is_counted, searches = filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, temperature_stride, k_stride, p_stride, vocab
    )
    if searches:
        highest, _ = likeliest_of_chunks(highest_ptr, token_ids_ptr, row, CHUNKS, PADDED)
        near, far = NOWHERE, DEEPEST
        if not IS_FIRST:
            near, far = stretch(
                last_edges_ptr, last_sums_ptr, first_sums_ptr, row, top_k, top_p, is_counted, CHUNKS, PADDED
            )
        token_ids = chunk * CHUNK + tl.arange(0, CHUNK)
        depths = depths_of(logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature)
        weights = tl.where(is_counted, 1.0, tl.exp(-depths))
        weights = tl.where(token_ids < vocab, weights, 0.0)
        for number in tl.static_range(EDGES):
            if IS_FIRST:
                # 1, 1.4, 2, ... 128: as fine as the end is likely to be near
                edge = NOWHERE if number == 0 else 2.0 ** ((number - 1) / 2)
            elif number == EDGES - 1:
                edge = far
            else:
                edge = near + (far - near) * (number / (EDGES - 1))
            tl.store(edges_ptr + row * EDGES + number, edge, mask=chunk == 0)
            within = tl.sum((depths <= edge).to(tl.float32) * weights, 0)
            tl.store(sums_ptr + (row * CHUNKS + chunk) * EDGES + number, within)


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=COLUMNS)  # type: ignore[untyped-decorator]
def collect_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    highest_ptr,
    token_ids_ptr,
    edges_ptr,  # of the last round
    sums_ptr,
    first_sums_ptr,
    stretches_ptr,  # float32 [rows, 2], depths: what is kept ends behind the one and not behind the other
    places_ptr,  # int16 [rows, CHUNKS, CHUNK], a list of each chunk's tokens in the stretch
    counts_ptr,  # int32 [rows, 2, CHUNKS], how many they are, and how many lie before the list
    masses_ptr,  # float64 [rows, 2, CHUNKS], of all tokens, and of those before the list
    temperature_stride,
    k_stride,
    p_stride,
    vocab,
    min_temperature,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """With both filters on, top-p may end anywhere within top-k: all from the likeliest on are listed."""
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    temperature, top_k, top_p, is_counted, searches = filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, temperature_stride, k_stride, p_stride, vocab
    )
    if searches:
        highest, _ = likeliest_of_chunks(highest_ptr, token_ids_ptr, row, CHUNKS, PADDED)
        near, far = stretch(
            edges_ptr, sums_ptr, first_sums_ptr, row, top_k, top_p, is_counted, CHUNKS, PADDED
        )
        tl.store(stretches_ptr + row * 2, near, mask=chunk == 0)
        tl.store(stretches_ptr + row * 2 + 1, far, mask=chunk == 0)
        near = tl.where(is_counted & (top_p < 1), NOWHERE, near)
        places = tl.arange(0, CHUNK)
        token_ids = chunk * CHUNK + places
        inside = token_ids < vocab
        depths = depths_of(logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature)
        weights = tl.exp(-depths).to(tl.float64)
        is_before = depths <= near
        listed = ((depths > near) & (depths <= far) & inside).to(tl.int32)
        at = (row * CHUNKS + chunk) * CHUNK + tl.cumsum(listed, 0) - 1
        tl.store(places_ptr + at, places.to(tl.int16), mask=listed > 0)
        at = row * 2 * CHUNKS + chunk
        tl.store(counts_ptr + at, tl.sum(listed, 0))
        tl.store(counts_ptr + at + CHUNKS, tl.sum(is_before.to(tl.int32), 0))
        tl.store(masses_ptr + at, tl.sum(weights, 0))
        tl.store(masses_ptr + at + CHUNKS, tl.sum(tl.where(is_before, weights, 0.0), 0))


@triton.jit  # type: ignore[untyped-decorator]
def end_of_kept(  # type: ignore[no-untyped-def]
    logits_ptr, places_ptr, row, counts, vocab, highest, temperature, min_temperature,
    start, end, before, target,
    BY_COUNT: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, CHUNK: tl.constexpr,
    WIDTH: tl.constexpr, ID_BITS: tl.constexpr,
):  # fmt: skip
    """-> a key in (start, end] with which the listed tokens reach `target`, of tokens or of mass, and without
    whose token they do not; and their mass up to there. `before` is what lies before the list.

    A key is a depth's bits, which order as it does, and a token id: no two tokens have the same.
    """
    numbers = tl.arange(0, PIVOTS)
    chunks = tl.arange(0, PADDED)
    longest = tl.max(counts, 0)
    mass = tl.full([], 0, tl.float64)
    num_before_start = tl.full([], 0, tl.int32)  # of the list
    num_between = tl.full([], 2, tl.int32)
    while (num_between > 1) & (end - start > 1):
        step = (end - start + PIVOTS - 1) // PIVOTS
        pivots = tl.minimum(start + step * (numbers + 1), end)
        nums = tl.zeros([PIVOTS], tl.int32)
        masses = tl.zeros([PIVOTS], tl.float64)
        for first in range(0, longest, WIDTH):
            columns = first + tl.arange(0, WIDTH)
            is_listed = columns[None, :] < counts[:, None]
            at = (row * CHUNKS + chunks[:, None]) * CHUNK + columns[None, :]
            places = tl.load(places_ptr + at, mask=is_listed, other=0).to(tl.int32)
            token_ids = chunks[:, None] * CHUNK + places
            depths = depths_of(logits_ptr, row, token_ids, vocab, highest, temperature, min_temperature)
            keys = (depths.to(tl.int32, bitcast=True).to(tl.int64) << ID_BITS) | token_ids
            keys = tl.reshape(tl.where(is_listed, keys, NO_KEY), [PADDED * WIDTH, 1])
            weights = tl.reshape(tl.exp(-depths).to(tl.float64), [PADDED * WIDTH, 1])
            is_within = keys <= pivots[None, :]
            nums += tl.sum(is_within.to(tl.int32), 0)
            masses += tl.sum(tl.where(is_within, weights, 0.0), 0)
        reached = nums.to(tl.float64) if BY_COUNT else masses
        # all of them reach it but for rounding
        reaches = (before + reached >= target) | (numbers == PIVOTS - 1)
        hit = PIVOTS - tl.sum(reaches.to(tl.int32), 0)
        num_before_start = tl.where(
            hit > 0, tl.sum(tl.where(numbers == hit - 1, nums, 0), 0), num_before_start
        )
        num_between = tl.sum(tl.where(numbers == hit, nums, 0), 0) - num_before_start
        mass = tl.sum(tl.where(numbers == hit, masses, 0.0), 0)
        end = tl.minimum(start + step * (hit + 1), end)
        start += step * hit
    return end, mass


@triton.jit(do_not_specialize=STRIDES, do_not_specialize_on_alignment=COLUMNS)  # type: ignore[untyped-decorator]
def settle_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,  # float64 [rows]
    highest_ptr,
    token_ids_ptr,
    stretches_ptr,
    places_ptr,
    counts_ptr,
    masses_ptr,
    least_ptr,  # float32 [rows], the least scaled logit that is kept
    last_ptr,  # int32 [rows], the last token that is kept of those at the least
    temperature_stride,
    k_stride,
    p_stride,
    min_p_stride,
    vocab,
    min_temperature,
    CHUNKS: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    ID_BITS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, is_counted, searches = filters(
        temperature_ptr, top_k_ptr, top_p_ptr, row, temperature_stride, k_stride, p_stride, vocab
    )
    min_p = tl.load(min_p_ptr + row * min_p_stride)
    depth = (0 - tl.log(tl.where(min_p > 0, min_p, 1.0))).to(tl.float32)
    depth = tl.where(min_p > 0, depth, float("inf"))
    last = ALL
    highest, token_id = likeliest_of_chunks(highest_ptr, token_ids_ptr, row, CHUNKS, PADDED)
    if searches & (token_id >= 0):
        chunks = tl.arange(0, PADDED)
        at = row * 2 * CHUNKS + chunks
        inside = chunks < CHUNKS
        counts = tl.load(counts_ptr + at, mask=inside, other=0)
        mass = tl.sum(tl.load(masses_ptr + at, mask=inside, other=0.0), 0)
        num_before = tl.sum(tl.load(counts_ptr + at + CHUNKS, mask=inside, other=0), 0)
        mass_before = tl.sum(tl.load(masses_ptr + at + CHUNKS, mask=inside, other=0.0), 0)
        near = tl.load(stretches_ptr + row * 2).to(tl.int32, bitcast=True).to(tl.int64)
        far = tl.load(stretches_ptr + row * 2 + 1).to(tl.int32, bitcast=True).to(tl.int64)
        start = tl.where(near < 0, -1, ((near + 1) << ID_BITS) - 1)
        end = ((far + 1) << ID_BITS) - 1
        if is_counted:
            end, mass = end_of_kept(
                logits_ptr, places_ptr, row, counts, vocab, highest, temperature, min_temperature,
                start, end, num_before.to(tl.float64), top_k.to(tl.float64),
                True, CHUNKS, PADDED, CHUNK, WIDTH, ID_BITS,
            )  # fmt: skip
            start = tl.full([], -1, tl.int64)
        if top_p < 1:
            end, _ = end_of_kept(
                logits_ptr, places_ptr, row, counts, vocab, highest, temperature, min_temperature,
                start, end, mass_before, top_p * mass,
                False, CHUNKS, PADDED, CHUNK, WIDTH, ID_BITS,
            )  # fmt: skip
        end_depth = (end >> ID_BITS).to(tl.int32).to(tl.float32, bitcast=True)
        last = tl.where(end_depth <= depth, (end & ((1 << ID_BITS) - 1)).to(tl.int32), last)
        depth = tl.minimum(depth, end_depth)
    tl.store(least_ptr + row, 0 - depth)
    tl.store(last_ptr + row, last)


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
    """See the package."""
    logits = logits.contiguous()
    highest = likeliest(logits)
    limits = limits_of(logits, temperature, top_k, top_p, min_p, highest)
    return draw(logits, temperature, (seeds, positions, sample_indices), highest, limits)


def limits_of(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    highest: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """-> float32 [rows], the least scaled logit that is kept, and int32 [rows], the last token kept at it."""
    rows, vocab = logits.shape
    chunks = highest[0].shape[1]
    device = logits.device
    asked = (logits, temperature, top_k, top_p)
    strides = (temperature.stride(0), top_k.stride(0), top_p.stride(0))
    numbers = (*strides, vocab, MIN_TEMPERATURE)
    constants = (chunks, next_power_of_2(chunks), CHUNK)
    edges = torch.empty(ROUNDS, rows, EDGES.value, device=device)
    sums = torch.empty(ROUNDS, rows, chunks, EDGES.value, device=device)
    for number in range(ROUNDS):
        last = max(number - 1, 0)
        found = (*highest, edges[number], sums[number], edges[last], sums[last], sums[0])
        launch(weigh_kernel, (rows, chunks), (*asked, *found), numbers, (number == 0, *constants))
    stretches = torch.empty(rows, 2, device=device)
    places = torch.empty(rows, chunks, CHUNK, dtype=torch.int16, device=device)
    counts = torch.empty(rows, 2, chunks, dtype=torch.int32, device=device)
    masses = torch.empty(rows, 2, chunks, dtype=torch.float64, device=device)
    listed = (stretches, places, counts, masses)
    searched = (*asked, *highest, edges[-1], sums[-1], sums[0], *listed)
    launch(collect_kernel, (rows, chunks), searched, numbers, constants, num_warps=8)
    least = torch.empty(rows, device=device)
    last_ids = torch.empty(rows, dtype=torch.int32, device=device)
    launch(
        settle_kernel,
        (rows,),
        (*asked, min_p, *highest, *listed, least, last_ids),
        (*strides, min_p.stride(0), vocab, MIN_TEMPERATURE),
        (*constants, max(1, TILE // constants[1]), (chunks * CHUNK - 1).bit_length()),
        num_warps=8,
    )
    return least, last_ids
