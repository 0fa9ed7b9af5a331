"""Codes of K and V inside Triton kernels: made where rotary_kv writes, read where coded_attention multiplies.

Reading goes by pairs: two codes of neighbouring dimensions are one int16, which tensor cores' loads bring,
transposed or not, straight from shared memory to where the float16 operands belong. A register holds two
such pairs; a few instructions make two float16 of the even dimensions and two of the odd ones. Nothing is
multiplied there: K's scale belongs to a column of the scores, V's to a column of the weights.
"""

import torch
import triton
import triton.language as tl

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
