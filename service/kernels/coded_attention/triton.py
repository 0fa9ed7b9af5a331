"""Attention over 8-bit codes on CUDA: paged_attention's kernels, without a dequantized copy of any tile.

A code becomes a float16 on its way into the tensor cores, exactly; even and odd dimensions are products of
their own (kernels/kv_codes/triton). K's scale multiplies the scores' column, V's the weights'. So that
neither overflows float16, whatever the scales, queries in bfloat16 are divided by a power of two, and the
highest of a row's scores is that of score + log2(V's scale): the largest weight times scale is about 1,
where it otherwise would be any number.

Codes are finite wherever they lie, so nothing is masked but scores and scales: a masked copy costs
registers.

Prompts would unpack all codes before them anew in every tile of queries, between the copies and the
products that wait for them. So their pages are unpacked once, a layer at a time, and paged_attention's own
kernel serves over these copies. Only behind many tokens, whose copies would take memory, does one here read
codes in place, and for deterministic plans: which way another goes depends on the step's other prompts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.decode_splits.triton import FIXED_LEAST_TOKENS, FIXED_SPLITS, combine_kernel, splits_of
from service.kernels.kv_codes.triton import codes_of, halves, scales_of, unpack_kernel
from service.kernels.launch import await_predecessor, cdiv, launch, next_power_of_2
from service.kernels.paged_attention import triton as paged
from service.kernels.paged_attention.plan import AttentionPlan
from service.kernels.paged_attention.triton import cap

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_queries(q_ptr, at, inside):  # type: ignore[no-untyped-def]
    """-> even and odd dimensions, as float16 if they were 16 bits wide, and what each row was divided by."""
    even = tl.load(q_ptr + at, mask=inside, other=0.0)
    odd = tl.load(q_ptr + at + 1, mask=inside, other=0.0)
    divisors = tl.full([even.shape[0]], 1.0, tl.float32)
    if q_ptr.dtype.element_ty == tl.bfloat16:
        largest = tl.max(tl.maximum(tl.abs(even.to(tl.float32)), tl.abs(odd.to(tl.float32))), 1)
        # powers of two, from 2^-100 to 2^100, by their exponents
        exponents = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 27), 227)
        divisors = (exponents << 23).to(tl.float32, bitcast=True)
        factors = ((254 - exponents) << 23).to(tl.float32, bitcast=True)[:, None]
        even, odd = (
            (even.to(tl.float32) * factors).to(tl.float16),
            (odd.to(tl.float32) * factors).to(tl.float16),
        )
    return even, odd, divisors


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q_even, q_odd, divisors, highest, total, even, odd, begin, end, positions,
    keys_ptr, values_ptr, scales_ptr, table_ptr, kv_head, window, scale, softcap,
    MASKED: tl.constexpr, DIVIDED: tl.constexpr, CODES: tl.constexpr, KV_HEADS: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, CAPPED: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows of queries over the keys `begin..end`; MASKED where some row does not see all of them.

    `positions` are the rows', or one of all.
    """
    keys_ptr = keys_ptr.to(tl.pointer_type(tl.int16))
    values_ptr = values_ptr.to(tl.pointer_type(tl.int16))
    scales_ptr = scales_ptr.to(tl.pointer_type(tl.int32))
    pairs = tl.arange(0, HALF)[None, :]
    for tile in range(begin, end, TILE):
        tokens = tile + tl.arange(0, TILE)
        if MASKED:
            block = tl.load(table_ptr + tokens // PAGE, mask=tokens < end, other=0)
        else:
            block = tl.load(table_ptr + tokens // PAGE)
        place = (block.to(tl.int64) * KV_HEADS + kv_head) * PAGE + tokens % PAGE
        both = tl.load(scales_ptr + place)
        at = (place * (DIM // 2))[:, None] + pairs
        if HALF * 2 == DIM:
            keys = tl.load(keys_ptr + at)
        else:
            keys = tl.load(keys_ptr + at, mask=pairs < DIM // 2, other=0)
        k_even, k_odd = halves(keys, CODES)
        scores = tl.dot(q_even, tl.trans(k_even.to(q_even.dtype)), input_precision="ieee")
        scores = tl.dot(q_odd, tl.trans(k_odd.to(q_odd.dtype)), scores, input_precision="ieee")
        k_scales, v_scales, v_logs = scales_of(both)
        if DIVIDED:
            scores *= divisors[:, None]
        if CAPPED:
            scores = cap(scores * (k_scales * scale)[None, :], softcap) * LOG2_E
        else:
            scores *= (k_scales * (scale * LOG2_E))[None, :]
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            seen &= (window <= 0) | (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
            v_scales = tl.where(tokens < end, v_scales, 0.0)  # what lies behind may be anybody's
        new_highest = tl.maximum(highest, tl.max(scores + v_logs[None, :], 1))
        if MASKED:
            # a query whose window begins behind this tile has seen no key yet
            new_highest = tl.maximum(new_highest, -1e30)
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        weights = (weights * v_scales[None, :]).to(q_even.dtype)
        if HALF * 2 == DIM:
            values = tl.load(values_ptr + at)
        else:
            values = tl.load(values_ptr + at, mask=pairs < DIM // 2, other=0)
        v_even, v_odd = halves(values, CODES)
        even = tl.dot(weights, v_even.to(weights.dtype), even * shrink[:, None], input_precision="ieee")
        odd = tl.dot(weights, v_odd.to(weights.dtype), odd * shrink[:, None], input_precision="ieee")
        highest = new_highest
    return highest, total, even, odd


@triton.jit
def store_result(out_ptr, at, even, odd, total, inside):  # type: ignore[no-untyped-def]
    tl.store(out_ptr + at, (even / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + at + 1, (odd / total[:, None]).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["window", "max_blocks"], do_not_specialize_on_alignment=["tables_ptr", "lengths_ptr"]
)
def coded_decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [S, KV_HEADS * GROUP, DIM]
    keys_ptr,  # codes [blocks, KV_HEADS, PAGE, DIM]
    values_ptr,
    scales_ptr,  # bfloat16 [blocks, KV_HEADS, PAGE, 2]
    tables_ptr,  # int32 [S, max_blocks]
    lengths_ptr,  # int32 [S]
    out_ptr,  # as q; with several splits float32 [S, KV_HEADS * GROUP, SPLITS, DIM]
    logs_ptr,  # float32 [S, KV_HEADS * GROUP, SPLITS], log2 of each split's sum of weights
    max_blocks,
    window,
    scale,
    softcap,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,  # tiles of a split
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    divided: tl.constexpr = q_ptr.dtype.element_ty == tl.bfloat16
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    first_tile = tl.maximum(tl.where(window > 0, length - window, 0), 0) // TILE
    per_split = tl.maximum(tl.cdiv(tl.cdiv(length, TILE) - first_tile, SPLITS), LEAST)
    begin = (first_tile + split * per_split) * TILE
    end = tl.minimum(begin + per_split * TILE, length)
    if (SPLITS == 1) | (begin < end):
        rows = tl.arange(0, ROWS)
        pairs = tl.arange(0, HALF)
        heads = sequence * (KV_HEADS * GROUP) + kv_head * GROUP + rows
        is_head = rows < GROUP
        inside = is_head[:, None] & (pairs < DIM // 2)[None, :]
        q_even, q_odd, divisors = load_queries(q_ptr, heads[:, None] * DIM + 2 * pairs[None, :], inside)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        zeros = tl.zeros([ROWS, HALF], tl.float32)
        highest, total, even, odd = attend(
            q_even, q_odd, divisors, highest, tl.zeros([ROWS], tl.float32), zeros, zeros, begin, end,
            tl.full([1], 0, tl.int32) + (length - 1), keys_ptr, values_ptr, scales_ptr,
            tables_ptr + sequence * max_blocks, kv_head, window, scale, softcap,
            True, divided, CODES, KV_HEADS, DIM, PAGE, CAPPED, HALF, TILE,
        )  # fmt: skip
        total = tl.where(total > 0, total, 1.0)  # a padded row of length 0 gets zeros
        at = (heads * SPLITS + split)[:, None] * DIM + 2 * pairs[None, :]
        store_result(out_ptr, at, even, odd, total, inside)
        if SPLITS > 1:
            tl.store(logs_ptr + heads * SPLITS + split, highest + tl.log2(total), mask=is_head)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["window", "max_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "lengths_ptr", "starts_ptr", "tiles_ptr"],
)
def coded_prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [T, KV_HEADS * GROUP, DIM]
    keys_ptr,  # codes [blocks, KV_HEADS, PAGE, DIM]
    values_ptr,
    scales_ptr,  # bfloat16 [blocks, KV_HEADS, PAGE, 2]
    tables_ptr,  # int32 [S, max_blocks]
    lengths_ptr,  # int32 [S]
    starts_ptr,  # int32 [S + 1]
    tiles_ptr,  # int32 [tiles, 2], AttentionPlan.tiles(ROWS // GROUP)
    out_ptr,  # as q
    max_blocks,
    window,
    scale,
    softcap,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    FIXED: tl.constexpr,  # one loop over the keys, whatever the tile's queries are
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    divided: tl.constexpr = q_ptr.dtype.element_ty == tl.bfloat16
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    start = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    earlier = tl.load(lengths_ptr + sequence) - count
    rows = tl.arange(0, ROWS)
    pairs = tl.arange(0, HALF)
    queries = first + rows // GROUP
    positions = earlier + queries
    is_row = (rows < ROWS // GROUP * GROUP) & (queries < count)
    inside = is_row[:, None] & (pairs < DIM // 2)[None, :]
    heads = (start + queries).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
    at = heads[:, None] * DIM + 2 * pairs[None, :]
    q_even, q_odd, divisors = load_queries(q_ptr, at, inside)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    even = tl.zeros([ROWS, HALF], tl.float32)
    odd = tl.zeros([ROWS, HALF], tl.float32)
    end = earlier + tl.minimum(first + ROWS // GROUP, count)
    begin = tl.maximum(tl.where(window > 0, earlier + first + 1 - window, 0), 0) // TILE * TILE
    table_ptr = tables_ptr + sequence.to(tl.int64) * max_blocks
    if not FIXED:
        # the keys that every query of the tile sees; with a window they are not worth a loop of their own
        clear = tl.where(window > 0, begin, (earlier + first + 1) // TILE * TILE)
        highest, total, even, odd = attend(
            q_even, q_odd, divisors, highest, total, even, odd, begin, clear, positions,
            keys_ptr, values_ptr, scales_ptr, table_ptr, kv_head, window, scale, softcap,
            False, divided, CODES, KV_HEADS, DIM, PAGE, CAPPED, HALF, TILE,
        )  # fmt: skip
        begin = clear
    highest, total, even, odd = attend(
        q_even, q_odd, divisors, highest, total, even, odd, begin, end, positions,
        keys_ptr, values_ptr, scales_ptr, table_ptr, kv_head, window, scale, softcap,
        True, divided, CODES, KV_HEADS, DIM, PAGE, CAPPED, HALF, TILE,
    )  # fmt: skip
    store_result(out_ptr, at, even, odd, tl.where(total > 0, total, 1.0), inside)


def decode_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys in a tile, warps, stages of its pipeline."""
    if dtype == torch.float32:
        return 32, 4, 1
    return (128, 4, 2) if head_dim <= 128 else (64, 4, 3)


def prefill_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Rows (queries times heads of a group), keys in a tile, warps, stages."""
    if dtype == torch.float32:
        return 32, 32, 8, 1
    return (128, 128, 8, 2) if head_dim <= 128 else (64, 32, 8, 2)


def coded_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See the package."""
    out = q.new_empty(q.shape) if out is None else out
    if plan.num_decode:
        decode(q, key_cache, value_cache, scales, plan, out, scale, window, softcap)
    if plan.num_decode < plan.num_sequences:
        serve = prefill_over_copies if plan.are_copied else prefill
        serve(q, key_cache, value_cache, scales, plan, out, scale, window, softcap)
    return out


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Tensor,
    plan: AttentionPlan,
    out: Tensor,
    scale: float,
    window: int,
    softcap: float,
    splits: int = 0,
) -> None:
    """The plan's first `num_decode` rows of q -> the same rows of out. `splits`: 0 for the fitting number."""
    _, heads, head_dim = q.shape
    _, kv_heads, page, _ = key_cache.shape
    rows, max_blocks = plan.num_decode, plan.block_tables.shape[1]
    tile, warps, stages = decode_shape(head_dim, q.dtype)
    least = 0
    launched = splits = splits or splits_of(rows, kv_heads, max_blocks * page, tile)
    if plan.deterministic:
        splits, least = FIXED_SPLITS, FIXED_LEAST_TOKENS // tile
        launched = min(splits, cdiv(max_blocks * page, FIXED_LEAST_TOKENS))  # no row has more
    target = logs = out
    if splits > 1:
        target = q.new_empty(rows * heads * splits, head_dim, dtype=torch.float32)
        logs = q.new_empty(rows * heads * splits, dtype=torch.float32)
    group, codes = heads // kv_heads, codes_of(key_cache.dtype)
    padded_group, half = max(16, next_power_of_2(group)), max(16, next_power_of_2(head_dim) // 2)
    launch(
        coded_decode_kernel,
        (rows, kv_heads, launched),
        (q, key_cache, value_cache, scales, plan.block_tables, plan.lengths, target, logs),
        (max_blocks, window, scale, softcap),
        (codes, group, kv_heads, head_dim, page, softcap > 0, splits, least, padded_group, half, tile),
        num_warps=warps,
        num_stages=stages,
    )
    if splits > 1:
        launch(
            combine_kernel,
            (rows * heads,),
            (target, logs, plan.lengths, out),
            (window,),
            (heads, head_dim, splits, least, next_power_of_2(head_dim), tile),
        )


def prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Tensor,
    plan: AttentionPlan,
    out: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """The rows of q behind the plan's decode -> the same rows of out."""
    _, heads, head_dim = q.shape
    _, kv_heads, page, _ = key_cache.shape
    rows, tile, warps, stages = prefill_shape(head_dim, q.dtype)
    group, codes = heads // kv_heads, codes_of(key_cache.dtype)
    rows, half = max(rows, next_power_of_2(group)), max(16, next_power_of_2(head_dim) // 2)
    tiles = plan.tiles(rows // group)
    launch(
        coded_prefill_kernel,
        (kv_heads, tiles.shape[0]),  # all heads of late queries first, as in paged_attention
        (q, key_cache, value_cache, scales, plan.block_tables, plan.lengths, plan.starts, tiles, out),
        (plan.block_tables.shape[1], window, scale, softcap),
        (codes, group, kv_heads, head_dim, page, softcap > 0, plan.deterministic, rows, half, tile),
        num_warps=warps,
        num_stages=stages,
    )


def prefill_over_copies(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scales: Tensor,
    plan: AttentionPlan,
    out: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> None:
    """As `prefill`. Codes are exact in the type of q, and scales are copied as they are."""
    _, kv_heads, page, head_dim = key_cache.shape
    firsts, pages = plan.copies(page)
    shape = len(pages), kv_heads, page
    key_copies, value_copies = q.new_empty(*shape, head_dim), q.new_empty(*shape, head_dim)
    scale_copies = scales.new_empty(*shape, 2)
    tables = plan.block_tables
    launch(
        unpack_kernel,
        (len(pages), kv_heads),
        (key_cache, value_cache, scales, tables, plan.lengths, pages, key_copies, value_copies, scale_copies),
        (tables.shape[1],),
        (codes_of(key_cache.dtype), kv_heads, head_dim, page, next_power_of_2(page * head_dim // 2)),
    )
    copies = key_copies, value_copies, plan.over(firsts)
    paged.prefill(q, *copies, out, scale, window, softcap, scale_copies)
