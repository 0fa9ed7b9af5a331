/* bf16 in registers, sixteen numbers at a time: widen, round, exponentiate. */

#ifndef VECTORS_AVX512_H
#define VECTORS_AVX512_H

#include <immintrin.h>

#include "halftone.h"

/* The lanes that are left of a row. */
static inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

static inline __m512 load_bf16(const bf16 *from, __mmask16 mask) {
    __m256i halves = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* bf16 to nearest even in the low half of each lane; vcvtneps2bf16 would make zeros of subnormal numbers. */
static inline __m512i to_bf16(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
}

/* x after one rounding to bf16. */
static inline __m512 through_bf16(__m512 x) { return _mm512_castsi512_ps(_mm512_slli_epi32(to_bf16(x), 16)); }

static inline void store_bf16(bf16 *to, __m512 x, __mmask16 mask) {
    _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(to_bf16(x)));
}

/* e^x within 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].

   Overflows to inf, ends in 0, and NaN stays NaN: min and max return their second operand for it. */
static inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(0x1.715476p+0f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0x1.62e430p-1f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-0x1.05c610p-29f), r);
    __m512 y = _mm512_set1_ps(0x1.a01a02p-13f); /* 1 / 7!, and so on to 1 / 0! */
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.6c16c2p-10f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.111112p-7f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.555556p-5f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0x1.555556p-3f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, n);
}

/* softcap * tanh(x / softcap), tanh(y) = 1 - 2 / (e^2y + 1) */
static inline __m512 capped(__m512 x, float softcap) {
    const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f), cap = _mm512_set1_ps(softcap);
    __m512 grown = exponential(_mm512_mul_ps(two, _mm512_div_ps(x, cap)));
    return _mm512_mul_ps(cap, _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(grown, one))));
}

/* 1 / sqrt(mean of squares + eps) from the sums of squares; n numbers were squared. */
static inline __m512 rms_factor(__m512 squares, int64_t n, float eps) {
    float mean = _mm512_reduce_add_ps(squares) / (float)n;
    return _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + eps));
}

#endif
