/* Linears of 8-bit floats (E4M3: sign, 4 bits of exponent less 7, 3 of mantissa; no infinity) against rows of such.

   y = sx (xq . wq) sw + bias, xq = x / sx rounded to E4M3, sx = the row's largest magnitude / 448. Every E4M3 number
   is a bf16 number, so products are exact, sums are float32, and y is rounded once.

   Codes lie as [out / 64][in / 2][64][2] bytes: dot_avx512.h's order. */

#include "dot_avx512.h"

enum { SLAB = 64 }; /* pairs of features that are decoded at a time: 16 KiB */

#define MOST 448.0f             /* E4M3's largest */
#define LEAST_NORMAL 0x1p-6f    /* below it, steps of 2^-9 */
#define STEPS_OF_SUBNORMALS 0x1.8p14f /* float32's own step is 2^-9 from here to twice as far */

struct fp8_linear {
    const bf16 *x; /* [rows, in] */
    bf16 *y;       /* [rows, out] */
    int64_t rows;
    int64_t in_features;  /* even */
    int64_t out_features; /* a multiple of 64 */
    const uint8_t *codes;
    const float *scales; /* [out] */
    const bf16 *bias;    /* [out], or null */
};

typedef struct {
    const struct fp8_linear *op;
    bf16 *x;         /* [rows, in], E4M3 numbers */
    float *x_scales; /* [rows] */
} fp8_call;

/* bf16 of magnitudes 0 .. 7, the subnormal numbers, less the 16 m that `decode` has for them already. */
static const bf16 SUBNORMALS[8] = {0x0000, 0x3af0, 0x3b60, 0x3b90, 0x3bc0, 0x3bd0, 0x3be0, 0x3bf0};

INLINE __m512i load_subnormals(void) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)SUBNORMALS));
}

/* 32 codes -> bf16: exponent and mantissa move up by 4 bits, and the exponent's offset changes from 7 to 127. */
INLINE __m512i decode(const uint8_t *codes, __m512i subnormals) {
    const __m512i exponent = _mm512_set1_epi16(0x78), offset = _mm512_set1_epi16((127 - 7) << 7);
    __m512i code = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes)); /* the sign in all upper bits */
    __m512i moved = _mm512_and_si512(_mm512_slli_epi16(code, 4), _mm512_set1_epi16((int16_t)0x87f0));
    __mmask32 is_subnormal = _mm512_testn_epi16_mask(code, exponent);
    return _mm512_add_epi16(moved, _mm512_mask_permutexvar_epi16(offset, is_subnormal, code, subnormals));
}

/* To E4M3 and back, nearest even; at most MOST in magnitude, NaN stays NaN. */
INLINE __m512 through_e4m3(__m512 x) {
    const __m512 steps = _mm512_set1_ps(STEPS_OF_SUBNORMALS);
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff)), odd);
    bits = _mm512_and_si512(bits, _mm512_set1_epi32(~0xfffff));
    __mmask16 small = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(LEAST_NORMAL), _CMP_LT_OQ);
    __mmask16 number = _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q); /* of a NaN the carry may run into the sign */
    __m512 rounded = _mm512_mask_mov_ps(x, number, _mm512_castsi512_ps(bits));
    return _mm512_mask_sub_ps(rounded, small, _mm512_add_ps(x, steps), steps);
}

static void quantize_tile(const void *arguments, int64_t row) {
    const fp8_call *call = arguments;
    const int64_t n = call->op->in_features;
    const bf16 *x = call->op->x + row * n;
    __m512 largest = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES)
        largest = _mm512_max_ps(largest, _mm512_abs_ps(load_bf16(x + i, lanes(n - i))));
    float scale = _mm512_reduce_max_ps(largest) / MOST;
    scale = scale > 0 ? scale : 1; /* nothing but zeros, or NaN, which stays what it is */
    for (int64_t i = 0; i < n; i += LANES) {
        __mmask16 mask = lanes(n - i);
        store_bf16(call->x + row * n + i, through_e4m3(_mm512_div_ps(load_bf16(x + i, mask), _mm512_set1_ps(scale))), mask);
    }
    call->x_scales[row] = scale;
}

/* Goes on with some rows' sums: `weights` has the block's next SLAB pairs of features, or fewer. */
INLINE void add_slab(const int rows, const fp8_call *call, int64_t row, int64_t first, int64_t pairs,
                     const bf16 *weights, __m512 totals[][COLUMNS]) {
    const int64_t stride = call->op->in_features / 2;
    const uint32_t *x = (const uint32_t *)call->x + row * stride + first;
    __m512 sums[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = totals[r][c];
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i now[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) now[c] = _mm512_load_si512(weights + (pair * BLOCK + c * LANES) * 2);
        dot_pair(rows, sums, now, x + pair, stride);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) totals[r][c] = sums[r][c];
}

/* What a step of few streams needs: codes become weights in registers. */
INLINE void few_rows(const int rows, const fp8_call *call, int64_t block, int64_t row, __m512 totals[][COLUMNS]) {
    const int64_t pairs = call->op->in_features / 2;
    const uint8_t *codes = call->op->codes + block * BLOCK * call->op->in_features;
    const uint32_t *x = (const uint32_t *)call->x + row * pairs;
    const __m512i subnormals = load_subnormals();
    __m512 sums[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i weights[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) weights[c] = decode(codes + (pair * BLOCK + c * LANES) * 2, subnormals);
        dot_pair(rows, sums, weights, x + pair, pairs);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) totals[r][c] = sums[r][c];
}

/* What a prompt needs: each code becomes a weight once for all rows of the tile. The sums are the same. */
static void many_rows(const fp8_call *call, int64_t block, int64_t start, int64_t end, __m512 totals[][COLUMNS]) {
    const int64_t pairs = call->op->in_features / 2;
    const uint8_t *codes = call->op->codes + block * BLOCK * call->op->in_features;
    const __m512i subnormals = load_subnormals();
    __m512i weights[SLAB * COLUMNS];
    for (int64_t r = 0; r < end - start; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) totals[r][c] = _mm512_setzero_ps();
    for (int64_t first = 0; first < pairs; first += SLAB) {
        const int64_t count = smaller(SLAB, pairs - first);
        for (int64_t i = 0; i < count * COLUMNS; i++)
            weights[i] = decode(codes + (first * COLUMNS + i) * 2 * LANES, subnormals);
        for (int64_t row = start; row < end; row += MOST_ROWS)
            WITH_CONSTANT_ROWS(smaller(end - row, MOST_ROWS), add_slab, call, row, first, count,
                               (const bf16 *)weights, totals + (row - start))
    }
}

static void fp8_tile(const void *arguments, int64_t tile) {
    const fp8_call *call = arguments;
    const struct fp8_linear *op = call->op;
    const int64_t blocks = op->out_features / BLOCK, block = tile % blocks, start = tile / blocks * CHUNK_ROWS;
    const int64_t end = smaller(start + CHUNK_ROWS, op->rows);
    __m512 totals[CHUNK_ROWS][COLUMNS];
    if (end - start > MOST_ROWS)
        many_rows(call, block, start, end, totals);
    else
        WITH_CONSTANT_ROWS(end - start, few_rows, call, block, start, totals)
    for (int64_t r = 0; r < end - start; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            const int64_t column = block * BLOCK + c * LANES;
            __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(op->scales + column), _mm512_set1_ps(call->x_scales[start + r]));
            store_outputs(op->y, op->bias, start + r, column, op->out_features, _mm512_mul_ps(totals[r][c], scale));
        }
}

EXPORT void halftone_fp8_linear(const struct fp8_linear *op) {
    const int64_t x_bytes = (op->rows * op->in_features * 2 + 63) / 64 * 64;
    char *space = workspace(x_bytes + op->rows * (int64_t)sizeof(float));
    const fp8_call call = {.op = op, .x = (bf16 *)space, .x_scales = (float *)(space + x_bytes)};
    parallel(quantize_tile, &call, op->rows);
    parallel(fp8_tile, &call, linear_tiles(op->out_features, op->rows));
}
