"""Codes of K and V inside Triton kernels: made where rotary_kv writes, read where coded_attention multiplies,
or unpacked for prompts before that.

Reading goes by pairs: two codes of neighbouring dimensions are one int16, which tensor cores' loads bring,
transposed or not, straight from shared memory to where the float16 operands belong. A register holds two
such pairs; a few instructions make two float16 of the even dimensions and two of the odd ones. Nothing is
multiplied there: K's scale belongs to a column of the scores, V's to a column of the weights.
"""

import torch
import triton
import triton.language as tl

from service.kernels.launch import await_predecessor

INT8, FP8 = tl.constexpr(1), tl.constexpr(2)  # CODES of a kernel; 0: values as they are
LEAST_SCALE = tl.constexpr(2.0**-60)
INT8_STEP, FP8_STEP = tl.constexpr(1 / 127), tl.constexpr(1 / 448)
# a number that float32 holds without halves: adding it rounds, to even
WHOLE = tl.constexpr(12582912.0)

# a byte b = code + 128 below 0x64 is the float16 1024 + b
INT8_HALVES = tl.constexpr(
    "{ .reg .b32 bytes, bias; "
    "xor.b32 bytes, $2, 0x80808080; "
    "mov.b32 bias, 0x64806480; "
    "prmt.b32 $0, bytes, 0x64646464, 0x4240; "
    "prmt.b32 $1, bytes, 0x64646464, 0x4341; "
    "sub.rn.f16x2 $0, $0, bias; "
    "sub.rn.f16x2 $1, $1, bias; }"
)
FP8_HALVES = tl.constexpr(
    "{ .reg .b32 bytes; .reg .b16 even, odd; "
    "prmt.b32 bytes, $2, $2, 0x3120; "
    "mov.b32 {even, odd}, bytes; "
    "cvt.rn.f16x2.e4m3x2 $0, even; "
    "cvt.rn.f16x2.e4m3x2 $1, odd; }"
)
TWO_HALVES = tl.constexpr((tl.float16, tl.float16))


def codes_of(dtype: torch.dtype) -> int:
    """CODES of a kernel over caches of this type."""
    return {torch.int8: INT8.value, torch.float8_e4m3fn: FP8.value}.get(dtype, 0)


@triton.jit  # type: ignore[untyped-decorator]
def halves(pairs, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    """int16 -> its codes as two float16, of the even dimension and of the odd one; exact."""
    if CODES == INT8:
        even, odd = tl.inline_asm_elementwise(
            INT8_HALVES, "=r,=r,r", [pairs], TWO_HALVES, is_pure=True, pack=2
        )
    else:
        even, odd = tl.inline_asm_elementwise(
            FP8_HALVES, "=r,=r,r", [pairs], TWO_HALVES, is_pure=True, pack=2
        )
    return even, odd


@triton.jit
def scales_of(both):  # type: ignore[no-untyped-def]
    """int32, a token's two bfloat16 -> K's scale and V's as float32, and log2 of V's within 0.09."""
    # bfloat16 is the upper half of float32
    k_scales = (both << 16).to(tl.float32, bitcast=True)
    v_scales = (both >> 16 << 16).to(tl.float32, bitcast=True)
    # exponent, and mantissa as if it were its own logarithm
    v_logs = (both >> 16).to(tl.float32) * (1 / 128) - 127
    return k_scales, v_scales, v_logs


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["max_blocks"],
    do_not_specialize_on_alignment=["tables_ptr", "lengths_ptr", "pages_ptr"],
)
def unpack_kernel(  # type: ignore[no-untyped-def]
    keys_ptr,  # codes [blocks, KV_HEADS, PAGE, DIM]
    values_ptr,
    scales_ptr,  # bfloat16 [blocks, KV_HEADS, PAGE, 2]
    tables_ptr,  # int32 [S, max_blocks]
    lengths_ptr,  # int32 [S]
    pages_ptr,  # int32 [copies, 2], sequence and page within it
    key_copies_ptr,  # [copies, KV_HEADS, PAGE, DIM]
    value_copies_ptr,
    scale_copies_ptr,  # bfloat16 [copies, KV_HEADS, PAGE, 2]
    max_blocks,
    CODES: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    PAIRS: tl.constexpr,  # of a page and head, rounded up
    IS_DEPENDENT: tl.constexpr,
):
    """A page of one head."""
    await_predecessor(IS_DEPENDENT)
    copy = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    sequence = tl.load(pages_ptr + 2 * copy)
    page = tl.load(pages_ptr + 2 * copy + 1)
    if page * PAGE < tl.load(lengths_ptr + sequence):
        block = tl.load(tables_ptr + sequence.to(tl.int64) * max_blocks + page).to(tl.int64)
        source = (block * KV_HEADS + kv_head) * PAGE
        target = (copy * KV_HEADS + kv_head) * PAGE
        tokens = tl.arange(0, PAGE)
        both = tl.load(scales_ptr.to(tl.pointer_type(tl.int32)) + source + tokens)
        tl.store(scale_copies_ptr.to(tl.pointer_type(tl.int32)) + target + tokens, both)
        pairs = tl.arange(0, PAIRS)
        inside = pairs < PAGE * DIM // 2
        at = source * (DIM // 2) + pairs
        keys = tl.load(keys_ptr.to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0)
        values = tl.load(values_ptr.to(tl.pointer_type(tl.int16)) + at, mask=inside, other=0)
        store_unpacked(key_copies_ptr + target * DIM, keys, CODES, DIM, PAGE, PAIRS)
        store_unpacked(value_copies_ptr + target * DIM, values, CODES, DIM, PAGE, PAIRS)


@triton.jit  # type: ignore[untyped-decorator]
def store_unpacked(  # type: ignore[no-untyped-def]
    copies_ptr, pairs, CODES: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, PAIRS: tl.constexpr
):
    even, odd = halves(pairs, CODES)
    # through float32, exactly, for bfloat16 has no shorter way
    codes = tl.interleave(even.to(tl.float32), odd.to(tl.float32)).to(copies_ptr.dtype.element_ty)
    places = tl.arange(0, 2 * PAIRS)
    tl.store(copies_ptr + places, codes, mask=places < PAGE * DIM)


@triton.jit  # type: ignore[untyped-decorator]
def quantized(left, right, CODES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Two halves of heads [HEADS, COLUMNS] each -> their codes, and bfloat16 scales [HEADS]."""
    left, right = left.to(tl.float32), right.to(tl.float32)
    # compared as bits, whose order is that of numbers that are not negative, with NaN above all of them
    left_bits = left.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    right_bits = right.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(tl.maximum(left_bits, right_bits), 1).to(tl.float32, bitcast=True)
    scales = (largest * (INT8_STEP if CODES == INT8 else FP8_STEP)).to(tl.bfloat16)
    wide = scales.to(tl.float32)
    wide = tl.where(wide < LEAST_SCALE, LEAST_SCALE, wide)
    inverse = tl.div_rn(1.0, wide)[:, None]
    left = tl.where(inverse > 0, left * inverse, 0.0)
    right = tl.where(inverse > 0, right * inverse, 0.0)
    if CODES == INT8:
        left, right = ((left + WHOLE) - WHOLE).to(tl.int8), ((right + WHOLE) - WHOLE).to(tl.int8)
    else:
        left, right = left.to(tl.float8e4nv), right.to(tl.float8e4nv)
    return left, right, wide.to(tl.bfloat16)
