"""The kernels of int8_one_pass.py: rows quantized where they are made, and 8-bit products of few and many rows.

Outliers are each row's own. Two ways for them, both without a question to the device:

- stacked: three rows of codes for each row of x (regular; outliers coarse; outliers fine: 16 bits), one s8 product.
  The weight is read once, as it is; outlier columns cost nothing. For few rows, where rows are free.
- gathered: flags of columns -> a list and its length on the device; the product of the listed columns, in
  16 bits, is added in the same launch. For many rows, where three products would cost too much.
"""

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """To the nearest integer, ties to even, for |x| < 2^22: what adding 1.5 * 2^23 leaves."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_row(
    x, row, columns, inside, rows, codes, steps, flags, threshold, WIDTH: tl.constexpr, STACKED: tl.constexpr
):
    """x float32 [COLUMNS], rounded as its 16-bit copy in memory; `rows` to the next part of a stack."""
    magnitude = tl.abs(x)
    is_outlier = magnitude >= threshold
    regular = tl.where(is_outlier, 0.0, x)
    most = tl.max(tl.abs(regular), 0)
    codes_at = codes + row.to(tl.int64) * WIDTH + columns
    factor = tl.where(most > 0, 127 / most, 0.0)
    tl.store(codes_at, nearest(regular * factor).to(tl.int8), mask=inside)
    tl.store(steps + row, most / 127)
    if STACKED:
        outlier = tl.where(is_outlier, x, 0.0)
        step = tl.max(tl.abs(outlier), 0) / 127
        coarse = nearest(outlier * tl.where(step > 0, 1 / step, 0.0))
        fine = nearest((outlier - coarse * step) * tl.where(step > 0, 254 / step, 0.0))
        fine = tl.minimum(tl.maximum(fine, -127.0), 127.0)
        tl.store(codes_at + rows.to(tl.int64) * WIDTH, coarse.to(tl.int8), mask=inside)
        tl.store(codes_at + 2 * rows.to(tl.int64) * WIDTH, fine.to(tl.int8), mask=inside)
        tl.store(steps + rows + row, step)
        tl.store(steps + 2 * rows + row, step / 254)
    else:
        # all who find one write the same
        tl.store(flags + columns, tl.full([columns.shape[0]], 1, tl.int8), mask=inside & is_outlier)


@triton.jit(do_not_specialize=["rows"])
def norm_quantize(
    hidden,
    delta,
    weight,
    live,
    total,
    normed,
    codes,
    steps,
    flags,
    rows,
    eps,
    threshold,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STACKED: tl.constexpr,
):
    """add_rms_norm, and its outcome as int8 codes; a row from `live` on is padding: zeros that flag nothing."""
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    at = row.to(tl.int64) * WIDTH + columns
    sum16 = (
        tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
        + tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
    ).to(tl.float16)
    tl.store(total + at, sum16, mask=inside)
    wide = sum16.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    x = ((wide * scale).to(tl.float16).to(tl.float32) * gain).to(tl.float16)
    if not STACKED:
        tl.store(normed + at, x, mask=inside)
    x = tl.where(row < tl.load(live), x.to(tl.float32), 0.0)
    quantize_row(x, row, columns, inside, rows, codes, steps, flags, threshold, WIDTH, STACKED)


@triton.jit(do_not_specialize=["rows"])
def silu_quantize(
    gate_up,
    live,
    out,
    codes,
    steps,
    flags,
    rows,
    threshold,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STACKED: tl.constexpr,
):
    """gated_silu, and its outcome as int8 codes."""
    row = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    at = gate_up + row.to(tl.int64) * (2 * WIDTH) + columns
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=inside, other=0.0).to(tl.float32)
    x = (gate / (1 + tl.exp(-gate)) * up).to(tl.float16)
    if not STACKED:
        tl.store(out + row.to(tl.int64) * WIDTH + columns, x, mask=inside)
    x = tl.where(row < tl.load(live), x.to(tl.float32), 0.0)
    quantize_row(x, row, columns, inside, rows, codes, steps, flags, threshold, WIDTH, STACKED)


@triton.jit
def list_columns(flags, columns, count, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Flags int8 [WIDTH], zeros afterwards -> the flagged columns in their order, and how many they are."""
    at = tl.arange(0, COLUMNS)
    inside = at < WIDTH
    flag = tl.load(flags + at, mask=inside, other=0).to(tl.int32)
    tl.store(flags + at, tl.zeros([COLUMNS], tl.int8), mask=inside)
    tl.store(columns + tl.cumsum(flag, 0) - 1, at, mask=flag > 0)
    tl.store(count, tl.sum(flag, 0))


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    w,
    x,
    w_steps,
    x_steps,
    x16,
    columns,
    count,
    out,
    parts,
    arrived,
    rows,
    K,
    share,
    N,
    threshold,
    LEVELS: tl.constexpr,
    LISTED: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    INTEGER: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_O: tl.constexpr,
):
    """x [LEVELS * rows, K] and w [N, K], both int8 or both fp8 -> out [rows, N]; the weight is the left operand.

    ROWS is a power of two; a stack of three levels has room for four. LISTED: one level, and the product of the
    listed columns, which the splits share.
    """
    PARTS: tl.constexpr = 4 if LEVELS == 3 else 1  # noqa: N806
    tile = tl.program_id(0)
    split = tl.program_id(1)
    n = tile * TILE_N + tl.arange(0, TILE_N)
    place = tl.arange(0, ROWS * PARTS)
    is_row = (place % ROWS < rows) & (place // ROWS < LEVELS)
    source = place // ROWS * rows + place % ROWS
    k = split * share + tl.arange(0, TILE_K)
    w_at = w + n[:, None].to(tl.int64) * K + k[None, :]
    x_at = x + source[None, :] * K + k[:, None]
    total = tl.zeros([TILE_N, ROWS * PARTS], tl.int32 if INTEGER else tl.float32)
    for _ in range(0, share, TILE_K):
        weight = tl.load(w_at, eviction_policy="evict_first")
        codes = tl.load(x_at, mask=is_row[None, :], other=0.0)
        total = tl.dot(weight, codes, total, out_dtype=tl.int32 if INTEGER else tl.float32)
        w_at += TILE_K
        x_at += TILE_K
    steps = tl.load(x_steps + source, mask=is_row, other=0.0)
    result = total.to(tl.float32) * steps[None, :]
    if LEVELS == 3:
        result = tl.sum(tl.reshape(result, [TILE_N, 4, ROWS]), 1)
    row = tl.arange(0, ROWS)
    if LISTED:
        live = tl.load(count)
        for start in range(split * TILE_O, live, SPLITS * TILE_O):
            at_list = start + tl.arange(0, TILE_O)
            column = tl.load(columns + at_list, mask=at_list < live, other=0)
            a = tl.load(w + n[:, None].to(tl.int64) * K + column[None, :]).to(tl.float16)
            b = tl.load(x16 + row[None, :] * K + column[:, None], mask=(row < rows)[None, :], other=0.0)
            b = tl.where((tl.abs(b.to(tl.float32)) >= threshold) & (at_list < live)[:, None], b, 0.0)
            result = tl.dot(a, b.to(tl.float16), result)
    at = row[None, :] * N + n[:, None]
    is_live = (row < rows)[None, :]
    is_last = True
    if SPLITS > 1:
        part = rows * N
        tl.store(parts + split * part + at, result, mask=is_live)
        tl.debug_barrier()
        is_last = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            result = tl.load(parts + at, mask=is_live, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                result += tl.load(parts + other * part + at, mask=is_live, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if is_last:
        result *= tl.load(w_steps + n)[:, None]
        tl.store(out + at, result.to(tl.float16), mask=is_live)


@triton.jit
def add_outliers(
    result, w, x16, columns, count, m, n, threshold, K, PADDED, GATHERED: tl.constexpr, TILE: tl.constexpr
):
    """result [m, n] += outliers in the listed columns times the weight's codes, in 16 bits.

    The codes are taken out of w [N, K], or GATHERED from what `gather_columns` left: float16 [N, PADDED].
    """
    live = tl.load(count)
    for start in range(0, live, TILE):
        at = start + tl.arange(0, TILE)
        column = tl.load(columns + at, mask=at < live, other=0)
        a = tl.load(x16 + m[:, None].to(tl.int64) * K + column[None, :])
        a = tl.where((tl.abs(a.to(tl.float32)) >= threshold) & (at < live)[None, :], a, 0.0)
        if GATHERED:
            b = tl.load(w + n[None, :].to(tl.int64) * PADDED + at[:, None])
        else:
            b = tl.load(w + n[None, :].to(tl.int64) * K + column[:, None]).to(tl.float16)
        result = tl.dot(a.to(tl.float16), b, result)
    return result


@triton.jit
def gather_columns(w, columns, count, w16, K, PADDED, TILE_N: tl.constexpr, TILE: tl.constexpr):
    """Listed columns of the weight as float16 codes [N, PADDED], zeros behind the last one of a tile."""
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    live = tl.load(count)
    for start in range(0, live, TILE):
        at = start + tl.arange(0, TILE)
        column = tl.load(columns + at, mask=at < live, other=0)
        value = tl.load(w + n[:, None].to(tl.int64) * K + column[None, :], mask=(at < live)[None, :], other=0)
        tl.store(w16 + n[:, None].to(tl.int64) * PADDED + at[None, :], value.to(tl.float16))


@triton.jit(do_not_specialize=["M"])
def many_rows(
    x,
    w,
    x16,
    side,
    x_steps,
    w_steps,
    columns,
    count,
    out,
    M,
    N,
    K,
    PADDED,
    threshold,
    OUTLIERS: tl.constexpr,
    INTEGER: tl.constexpr,
    COPY: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    TILE_O: tl.constexpr,
):
    """x [M, K] and w [N, K], both int8 or both fp8 -> out [M, N]. OUTLIERS: none, inline, gathered.

    `side`: w again, or its gathered columns. COPY: x and w are descriptors for the bulk copy engine, else pointers.
    """
    tiles_m = tl.cdiv(M, TILE_M)
    program = tl.program_id(0)
    first_m = (program % tiles_m) * TILE_M
    first_n = (program // tiles_m) * TILE_N
    m = first_m + tl.arange(0, TILE_M)
    n = first_n + tl.arange(0, TILE_N)
    total = tl.zeros([TILE_M, TILE_N], tl.int32 if INTEGER else tl.float32)
    if not COPY:
        k = tl.arange(0, TILE_K)
        x_at = x + m[:, None] * K + k[None, :]
        w_at = w + n[None, :].to(tl.int64) * K + k[:, None]
    for start in range(0, K, TILE_K):
        if COPY:
            a = x.load([first_m, start])
            b = w.load([first_n, start]).T
        else:
            a, b = tl.load(x_at), tl.load(w_at)
            x_at += TILE_K
            w_at += TILE_K
        total = tl.dot(a, b, total, out_dtype=tl.int32 if INTEGER else tl.float32)
    result = total.to(tl.float32) * tl.load(x_steps + m)[:, None]
    if OUTLIERS != "none":
        result = add_outliers(
            result, side, x16, columns, count, m, n, threshold, K, PADDED, OUTLIERS == "gathered", TILE_O
        )
    result *= tl.load(w_steps + n)[None, :]
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], result.to(tl.float16))
