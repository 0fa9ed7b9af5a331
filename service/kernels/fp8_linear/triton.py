"""E4M3 on CUDA: any number of rows quantized in one kernel of Triton, few rows multiplied in another.

A program streams some rows of the weight, the left operand of the tensor cores' product, as
kernels/dense_linear does; shares of the inputs are added in their order. The tensor cores add products of
8-bit floats with fewer bits than float32 has, which over 14,336 inputs was 0.3 % off, so what they add up is
carried into float32 after each tile of 128 or 256 inputs. On an H100 kernels/w8_linear multiplies some of
what few rows there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.kernels.dense_linear.triton import LINE, arrivals
from service.kernels.fp8_linear.plan import FEW_ROWS, PLACES, Setting, setting_for, splits_for
from service.kernels.fp8_linear.reference import LARGEST
from service.kernels.int8_linear.plan import Tile
from service.kernels.int8_rows.triton import held, magnitude_bits, numbers_of, summed
from service.kernels.launch import await_then_release, cdiv, launch, next_power_of_2
from service.kernels.w8_linear import FewRows, row_for

LINE_BYTES = 2 * LINE


@triton.jit  # type: ignore[untyped-decorator]
def quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [rows, WIDTH], or twice as wide: gate and up
    delta_ptr,  # [rows, WIDTH], what ADDS to x before the norm
    gain_ptr,  # [WIDTH] of the norm
    total_ptr,  # [rows, WIDTH]: x with delta
    codes_ptr,  # float8_e4m3fn [rows, WIDTH]
    scales_ptr,  # float32 [rows]
    eps,
    SOURCE: tl.constexpr,
    ADDS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """As kernels/int8_rows: what precedes the linear is made here, and a row is held while it is encoded."""
    await_then_release(IS_DEPENDENT)
    IS_HELD: tl.constexpr = WIDTH <= TILE  # noqa: N806
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], total_ptr.dtype.element_ty)
    scale = 1.0
    if SOURCE == "hidden":
        squares = tl.zeros([TILE], tl.float32)
        for start in tl.static_range(0, WIDTH, TILE):
            columns = start + tl.arange(0, TILE)
            at = row * WIDTH + columns
            total = summed(x_ptr, delta_ptr, at, columns < WIDTH, ADDS)
            squares += total.to(tl.float32) * total.to(tl.float32)
            tl.store(total_ptr + at, total, mask=columns < WIDTH)
        scale = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    x = tl.zeros([TILE], x_ptr.dtype.element_ty)
    most_bits = tl.zeros([TILE], tl.int32)
    for start in tl.static_range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        x = numbers_of(
            x_ptr, delta_ptr, gain_ptr, row, columns, True, scale, total, SOURCE, ADDS, WIDTH, IS_HELD
        )
        most_bits = tl.maximum(most_bits, magnitude_bits(x.to(tl.float32)))
    most = tl.max(most_bits, 0).to(tl.float32, bitcast=True)
    step = tl.math.div_rn(most, LARGEST)
    step = tl.where(step == 0, 1.0, step)
    tl.store(scales_ptr + row, step)
    for start in tl.static_range(0, WIDTH, TILE):
        columns = start + tl.arange(0, TILE)
        if not IS_HELD:
            x = numbers_of(
                x_ptr, delta_ptr, gain_ptr, row, columns, True, scale, total, SOURCE, ADDS, WIDTH, IS_HELD
            )
        codes = tl.math.div_rn(x.to(tl.float32), tl.broadcast_to(step, [TILE]))
        tl.store(
            codes_ptr + row * WIDTH + columns, codes.to(codes_ptr.dtype.element_ty), mask=columns < WIDTH
        )


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]
def few_rows_kernel(  # type: ignore[no-untyped-def]
    codes_ptr,  # float8_e4m3fn [num_rows, in_features]
    row_scales_ptr,  # float32 [num_rows]
    weight_ptr,  # float8_e4m3fn [out_features, in_features]
    scales_ptr,  # float32 [out_features]
    bias_ptr,  # [out_features]
    out_ptr,  # [num_rows, out_features]
    parts_ptr,  # float32 [SPLITS, num_rows, out_features]
    arrived_ptr,  # int32 [tiles], zeros before and after
    num_rows,
    in_features,
    share,  # inputs of a split, a multiple of TILE_IN
    out_features,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    EVEN: tl.constexpr,  # splits are whole
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    LINE: tl.constexpr,
    PREFETCHED: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    outputs = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    is_output = outputs < out_features
    # what lies behind the last output is computed from the last one's weights, and not stored
    read = tl.minimum(outputs, out_features - 1).to(tl.int64)
    if IS_DEPENDENT:
        # the first tiles of the weight come into the L2 cache while the predecessor ends
        lines = tl.arange(0, PREFETCHED // LINE) * LINE
        begin = read[:, None] * in_features + split * share
        ahead = weight_ptr + begin + tl.minimum(lines, in_features - split * share - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ahead], tl.int32, is_pure=False, pack=1
        )
    await_then_release(IS_DEPENDENT)
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    inputs = split * share + tl.arange(0, TILE_IN)
    weight_at = weight_ptr + read[:, None] * in_features + inputs[None, :]
    codes_at = codes_ptr + rows[None, :] * in_features + inputs[:, None]
    total = tl.zeros([TILE_OUT, ROWS], tl.float32)
    for start in range(0, share, TILE_IN):
        if EVEN:
            weight = tl.load(weight_at, eviction_policy="evict_first")
            codes = tl.load(codes_at, mask=is_row[None, :], other=0.0)
        else:
            is_input = inputs + start < in_features
            weight = tl.load(weight_at, mask=is_input[None, :], other=0.0, eviction_policy="evict_first")
            codes = tl.load(codes_at, mask=is_row[None, :] & is_input[:, None], other=0.0)
        total += tl.dot(weight, codes)  # a tile's sum is rounded to float32 before it is added
        weight_at += TILE_IN
        codes_at += TILE_IN
    at = rows[None, :] * out_features + outputs[:, None]
    is_stored = is_row[None, :] & is_output[:, None]
    is_last = True
    if SPLITS > 1:
        part = num_rows * out_features
        tl.store(parts_ptr + split * part + at, total, mask=is_stored)
        tl.debug_barrier()  # every thread's part is stored before one thread says so
        is_last = tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if is_last:
            total = tl.load(parts_ptr + at, mask=is_stored, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(
                    parts_ptr + other * part + at, mask=is_stored, other=0.0, cache_modifier=".cg"
                )
            tl.store(arrived_ptr + tile, 0)
    if is_last:
        step = tl.load(scales_ptr + outputs, mask=is_output, other=0.0)
        row_step = tl.load(row_scales_ptr + rows, mask=is_row, other=0.0)
        y = total * (row_step[None, :] * step[:, None])
        if BIASED:
            y += tl.load(bias_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=is_stored)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """reference.quantize_rows, bit for bit."""
    x = x.contiguous()
    return _quantize("x", x, x, x, x, 0.0, x.shape[1])


def quantize_gated(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """[T, 2 in] -> `quantize_rows` of kernels/gated_silu of it."""
    gate_up = gate_up.contiguous()
    return _quantize("gate_up", gate_up, gate_up, gate_up, gate_up, 0.0, gate_up.shape[1] // 2)


def quantize_normed(
    hidden: Tensor, delta: Tensor | None, gain: Tensor, eps: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """hidden + delta [T, in], and `quantize_rows` of its norm as kernels/add_rms_norm."""
    hidden = hidden.contiguous()
    delta = hidden if delta is None else delta.contiguous()
    total = hidden.new_empty(hidden.shape)
    return total, _quantize("hidden", hidden, delta, gain, total, eps, hidden.shape[1])


def _quantize(
    source: str,
    x: Tensor,
    delta: Tensor,
    gain: Tensor,
    total: Tensor,
    eps: float,
    width: int,
) -> tuple[Tensor, Tensor]:
    num_rows = len(x)
    codes = x.new_empty(num_rows, width, dtype=torch.float8_e4m3fn)
    scales = x.new_empty(num_rows, dtype=torch.float32)
    numbers, warps = held(width)
    launch(
        quantize_kernel,
        (num_rows,),
        (x, delta, gain, total, codes, scales),
        (eps,),
        (source, delta is not x, width, numbers, int(LARGEST)),
        num_warps=warps,
        contracts=False,
    )
    return codes, scales


def fp8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, few: FewRows | None = None
) -> Tensor:
    """See the package."""
    return multiply(x, *quantize_rows(x), codes, scales, bias, few)


def gated_linear(
    gate_up: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, few: FewRows | None = None
) -> Tensor:
    """`fp8_linear` of kernels/gated_silu of [T, 2 in]."""
    return multiply(gate_up, *quantize_gated(gate_up), codes, scales, bias, few)


def normed_linear(
    hidden: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    few: FewRows | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden + delta, and `fp8_linear` of its norm."""
    total, coded = quantize_normed(hidden, delta, gain, eps)
    return total, multiply(hidden, *coded, codes, scales, bias, few)


def multiply(
    x: Tensor,
    rows: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    few: FewRows | None = None,
) -> Tensor:
    """Codes of rows [T, in] and of the weight -> [T, out] in the type of `x`."""
    if few and row_for(few.rows, len(rows)):
        return few.multiply(rows, row_scales)
    if len(rows) <= FEW_ROWS:
        return few_rows(x, rows, row_scales, codes, scales, bias)
    y: Tensor = torch._scaled_mm(
        rows, codes.t(), row_scales[:, None], scales[None, :], bias=bias, out_dtype=x.dtype
    )
    return y


def few_rows(
    x: Tensor,
    rows: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    tile: Tile | None = None,
    splits: int = 0,
) -> Tensor:
    """Codes of rows [T, in], T up to FEW_ROWS -> [T, out] in the type of `x`; 0 splits: as many as fit."""
    num_rows, in_features = rows.shape
    out_features = len(codes)
    setting = Setting(tile) if tile else setting_for(num_rows, in_features, out_features)
    tile, splits = setting.tile, splits or splits_for(in_features, out_features, setting)
    share = cdiv(cdiv(in_features, splits), tile.inputs) * tile.inputs
    splits = cdiv(in_features, share)
    out = x.new_empty(num_rows, out_features)
    parts = out if splits == 1 else scales.new_empty(splits, num_rows, out_features)
    launch(
        few_rows_kernel,
        (cdiv(out_features, tile.outputs), splits),
        (rows, row_scales, codes, scales, scales if bias is None else bias, out, parts, arrivals(x.device)),
        (num_rows, in_features, share, out_features),
        (
            bias is not None,
            splits,
            next(most for most in PLACES if num_rows <= most),
            share * splits == in_features,
            tile.outputs,
            tile.inputs,
            LINE_BYTES,
            next_power_of_2(tile.inputs * tile.num_stages),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
