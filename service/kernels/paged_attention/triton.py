"""Paged attention on CUDA: one kernel for decode, split along the context, and one for chunks of prompts.

The query heads of a KV head lie in one tile, so a key is loaded once for all of them. A decode launches as
many programs as fill the machine whatever the lengths are, which only the device knows: each split finds its
own share of the context, and a second kernel joins the shares in their order. There are no atomics, so one
input has one result. Softmax is float32 everywhere, in powers of two.

A deterministic plan lets a row's own length alone decide how its context is split, and has a prompt's keys go
through one loop: else those that a whole tile of queries sees go through another, whose code may round
differently, and which they are depends on how the prompt was cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.decode_splits.triton import FIXED_LEAST_TOKENS, FIXED_SPLITS, combine_kernel, splits_of
from service.kernels.kv_codes.triton import scales_of
from service.kernels.launch import await_predecessor, cdiv, launch, next_power_of_2
from service.kernels.paged_attention.plan import SHORT_PROMPT_TOKENS, AttentionPlan


@triton.jit
def cap(scores, softcap):  # type: ignore[no-untyped-def]
    """softcap * tanh(scores / softcap), by an exponential that may overflow to infinity."""
    return softcap - 2 * softcap / (tl.exp(scores * (2 / softcap)) + 1)


# A kernel that is compiled anew while requests wait stalls them, so nothing that changes from step to step is
# specialized on: lengths, and where the step's own small tensors happen to lie.
@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["window", "max_blocks"], do_not_specialize_on_alignment=["tables_ptr", "lengths_ptr"]
)
def decode_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [S, KV_HEADS * GROUP, DIM]
    keys_ptr,  # [blocks, KV_HEADS, PAGE, DIM]
    values_ptr,
    tables_ptr,  # int32 [S, max_blocks]
    lengths_ptr,  # int32 [S]
    out_ptr,  # as q; with several splits float32 [S, KV_HEADS * GROUP, SPLITS, DIM]
    logs_ptr,  # float32 [S, KV_HEADS * GROUP, SPLITS], log2 of each split's sum of weights
    max_blocks,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,  # tiles of a split
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + sequence)
    first = tl.maximum(tl.where(window > 0, length - window, 0), 0)
    first_tile = first // TILE
    per_split = tl.maximum(tl.cdiv(tl.cdiv(length, TILE) - first_tile, SPLITS), LEAST)
    begin = (first_tile + split * per_split) * TILE
    end = tl.minimum(begin + per_split * TILE, length)
    if (SPLITS == 1) | (begin < end):
        rows = tl.arange(0, ROWS)
        dims = tl.arange(0, WIDTH)
        heads = sequence * (KV_HEADS * GROUP) + kv_head * GROUP + rows
        is_head = rows < GROUP
        is_dim = dims < DIM
        inside_q = is_head[:, None] & is_dim[None, :]
        q = tl.load(q_ptr + heads[:, None] * DIM + dims[None, :], mask=inside_q, other=0.0)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        result = tl.zeros([ROWS, WIDTH], tl.float32)
        for tile in range(begin, end, TILE):
            tokens = tile + tl.arange(0, TILE)
            seen = (tokens < end) & (tokens >= first)
            block = tl.load(tables_ptr + sequence * max_blocks + tokens // PAGE, mask=seen, other=0)
            at = (block.to(tl.int64) * KV_HEADS + kv_head) * (PAGE * DIM) + (tokens % PAGE) * DIM
            inside = seen[:, None] & is_dim[None, :]
            keys = tl.load(keys_ptr + at[:, None] + dims[None, :], mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            if CAPPED:
                scores = cap(scores, softcap)
            scores = tl.where(seen[None, :], scores * 1.4426950408889634, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_highest[:, None])
            shrink = tl.exp2(highest - new_highest)
            values = tl.load(values_ptr + at[:, None] + dims[None, :], mask=inside, other=0.0)
            total = total * shrink + tl.sum(weights, 1)
            result = result * shrink[:, None]
            result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
            highest = new_highest
        total = tl.where(total > 0, total, 1.0)  # a padded row of length 0 gets zeros
        result = result / total[:, None]
        target = (heads * SPLITS + split)[:, None] * DIM + dims[None, :]
        tl.store(out_ptr + target, result.to(out_ptr.dtype.element_ty), mask=inside_q)
        if SPLITS > 1:
            tl.store(logs_ptr + heads * SPLITS + split, highest + tl.log2(total), mask=is_head)


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q, highest, total, result, begin, end, positions,
    keys_ptr, values_ptr, scales_ptr, table_ptr, kv_head, window, scale, softcap,
    MASKED: tl.constexpr, SCALED: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    CAPPED: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of queries over the keys `begin..end`; MASKED where some query does not see all of them.

    SCALED: of codes, whose scales coded_attention/triton explains. The table has the first page alone, the
    others lie behind it: a key's place is known before anything is read.
    """
    dims = tl.arange(0, WIDTH)
    if SCALED:
        first = (tl.load(table_ptr).to(tl.int64) * KV_HEADS + kv_head) * PAGE
        keys_ptr += first * DIM
        values_ptr += first * DIM
        scales_ptr = scales_ptr.to(tl.pointer_type(tl.int32)) + first
    for tile in range(begin, end, TILE):
        tokens = tile + tl.arange(0, TILE)
        if SCALED:
            place = tokens // PAGE * (KV_HEADS * PAGE) + tokens % PAGE
            at = (place * DIM)[:, None] + dims[None, :]
        else:
            if MASKED:
                block = tl.load(table_ptr + tokens // PAGE, mask=tokens < end, other=0).to(tl.int64)
            else:
                block = tl.load(table_ptr + tokens // PAGE).to(tl.int64)
            at = (block * KV_HEADS + kv_head) * (PAGE * DIM) + (tokens % PAGE) * DIM
            at = at[:, None] + dims[None, :]
        inside = (dims < DIM)[None, :] & (tokens < end)[:, None] if MASKED else (dims < DIM)[None, :]
        if MASKED or WIDTH != DIM:
            keys = tl.load(keys_ptr + at, mask=inside, other=0.0)
        else:
            keys = tl.load(keys_ptr + at)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if SCALED:
            if MASKED:
                both = tl.load(scales_ptr + place, mask=tokens < end, other=0)
            else:
                both = tl.load(scales_ptr + place)
            k_scales, v_scales, v_logs = scales_of(both)
            if CAPPED:
                scores = cap(scores * (k_scales * scale)[None, :], softcap) * 1.4426950408889634
            else:
                scores *= (k_scales * (scale * 1.4426950408889634))[None, :]
        elif CAPPED:
            scores = cap(scores * scale, softcap) * 1.4426950408889634
        else:
            scores *= scale * 1.4426950408889634
        if MASKED:
            seen = tokens[None, :] <= positions[:, None]
            seen &= (window <= 0) | (tokens[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        if SCALED:
            new_highest = tl.maximum(highest, tl.max(scores + v_logs[None, :], 1))
        else:
            new_highest = tl.maximum(highest, tl.max(scores, 1))
        if MASKED:
            # a query whose window begins behind this tile has seen no key yet
            new_highest = tl.maximum(new_highest, -1e30)
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        if MASKED or WIDTH != DIM:
            values = tl.load(values_ptr + at, mask=inside, other=0.0)
        else:
            values = tl.load(values_ptr + at)
        total = total * shrink + tl.sum(weights, 1)
        if SCALED:
            weights *= v_scales[None, :]
        result = result * shrink[:, None]
        result = tl.dot(weights.to(values.dtype), values, result, input_precision="ieee")
        highest = new_highest
    return highest, total, result


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["window", "max_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "lengths_ptr", "starts_ptr", "tiles_ptr"],
)
def prefill_kernel(  # type: ignore[no-untyped-def]
    q_ptr,  # [T, KV_HEADS * GROUP, DIM]
    keys_ptr,  # [blocks, KV_HEADS, PAGE, DIM]
    values_ptr,
    scales_ptr,  # bfloat16 [blocks, KV_HEADS, PAGE, 2] if SCALED
    tables_ptr,  # int32 [S, max_blocks]; if SCALED [S, 1], first blocks
    lengths_ptr,  # int32 [S]
    starts_ptr,  # int32 [S + 1]
    tiles_ptr,  # int32 [tiles, 2], AttentionPlan.tiles(ROWS // GROUP)
    out_ptr,  # as q
    max_blocks,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    FIXED: tl.constexpr,  # one loop over the keys, whatever the tile's queries are
    SCALED: tl.constexpr,  # keys and values are codes, each sequence's in blocks one behind another
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    await_predecessor(IS_DEPENDENT)
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    start = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - start
    earlier = tl.load(lengths_ptr + sequence) - count
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, WIDTH)
    queries = first + rows // GROUP
    positions = earlier + queries
    inside = ((rows < ROWS // GROUP * GROUP) & (queries < count))[:, None] & (dims < DIM)[None, :]
    heads = (start + queries).to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
    q = tl.load(q_ptr + heads[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, WIDTH], tl.float32)
    end = earlier + tl.minimum(first + ROWS // GROUP, count)
    begin = tl.maximum(tl.where(window > 0, earlier + first + 1 - window, 0), 0) // TILE * TILE
    table_ptr = tables_ptr + sequence.to(tl.int64) * max_blocks
    if not FIXED:
        # the keys that every query of the tile sees; with a window they are not worth a loop of their own
        clear = tl.where(window > 0, begin, (earlier + first + 1) // TILE * TILE)
        highest, total, result = attend(
            q, highest, total, result, begin, clear, positions,
            keys_ptr, values_ptr, scales_ptr, table_ptr, kv_head, window, scale, softcap,
            False, SCALED, KV_HEADS, DIM, PAGE, CAPPED, WIDTH, TILE,
        )  # fmt: skip
        begin = clear
    highest, total, result = attend(
        q, highest, total, result, begin, end, positions,
        keys_ptr, values_ptr, scales_ptr, table_ptr, kv_head, window, scale, softcap,
        True, SCALED, KV_HEADS, DIM, PAGE, CAPPED, WIDTH, TILE,
    )  # fmt: skip
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + heads[:, None] * DIM + dims[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)


def decode_shape(head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Keys in a tile, stages of its pipeline."""
    if dtype == torch.float32:
        return 32, 1
    return (64, 3) if head_dim <= 128 else (32, 3)


def prefill_shape(head_dim: int, dtype: torch.dtype, is_short: bool = False) -> tuple[int, int, int, int]:
    """Rows (queries times heads of a group), keys in a tile, warps, stages.

    `is_short`: prompts whose few tiles leave multiprocessors idle are cut finer; two programs then share one.
    """
    if dtype == torch.float32:
        return 32, 32, 8, 1
    if head_dim <= 64:
        return 128, 64, 4, 3
    if head_dim > 128:
        return 64, 64, 8, 2
    return (64, 64, 4, 2) if is_short else (128, 64, 8, 3)


def paged_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """See the package."""
    out = q.new_empty(q.shape) if out is None else out
    if plan.num_decode:
        decode(q, key_cache, value_cache, plan, out, scale, window, softcap)
    if plan.num_decode < plan.num_sequences:
        prefill(q, key_cache, value_cache, plan, out, scale, window, softcap)
    return out


def decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
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
    tile, stages = decode_shape(head_dim, q.dtype)
    width = next_power_of_2(head_dim)
    least = 0
    launched = splits = splits or splits_of(rows, kv_heads, max_blocks * page, tile)
    if plan.deterministic:
        splits, least = FIXED_SPLITS, FIXED_LEAST_TOKENS // tile
        launched = min(splits, cdiv(max_blocks * page, FIXED_LEAST_TOKENS))  # no row has more
    target = logs = out
    if splits > 1:
        target = q.new_empty(rows * heads * splits, head_dim, dtype=torch.float32)
        logs = q.new_empty(rows * heads * splits, dtype=torch.float32)
    group = heads // kv_heads
    padded_group = max(16, next_power_of_2(group))
    launch(
        decode_kernel,
        (rows, kv_heads, launched),
        (q, key_cache, value_cache, plan.block_tables, plan.lengths, target, logs),
        (max_blocks, window, scale, softcap),
        (group, kv_heads, head_dim, page, softcap > 0, splits, least, padded_group, width, tile),
        num_stages=stages,
    )
    if splits > 1:
        launch(
            combine_kernel,
            (rows * heads,),
            (target, logs, plan.lengths, out),
            (window,),
            (heads, head_dim, splits, least, width, tile),
        )


def prefill(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttentionPlan,
    out: Tensor,
    scale: float,
    window: int,
    softcap: float,
    scales: Tensor | None = None,
) -> None:
    """The rows of q behind the plan's decode -> the same rows of out. `scales`: caches hold codes in the
    type of q, and tables the first block of each sequence (coded_attention)."""
    _, heads, head_dim = q.shape
    _, kv_heads, page, _ = key_cache.shape
    is_short = not plan.deterministic and plan.longest_prompt <= SHORT_PROMPT_TOKENS
    rows, tile, warps, stages = prefill_shape(head_dim, q.dtype, is_short)
    group = heads // kv_heads
    rows = max(rows, next_power_of_2(group))
    tiles = plan.tiles(rows // group)
    width = next_power_of_2(head_dim)
    # all heads of late queries go first, else the last head's begin when most multiprocessors are done
    launch(
        prefill_kernel,
        (kv_heads, tiles.shape[0]),
        (
            q, key_cache, value_cache, key_cache if scales is None else scales,
            plan.block_tables, plan.lengths, plan.starts, tiles, out,
        ),
        (plan.block_tables.shape[1], window, scale, softcap),
        (
            group, kv_heads, head_dim, page, softcap > 0, plan.deterministic, scales is not None,
            rows, width, tile,
        ),
        num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
