/* LLM.int8(): int8 rows of x against int8 rows of weights, and outlier features in float32.

   bitsandbytes' codes, bit for bit: x is rounded to float16; a feature that reaches the threshold is an outlier,
   by row in that row alone, else in all rows of the call if it does in any (bitsandbytes' rule); a row's scale is
   the largest magnitude below the threshold, of outlier features too; codes are round(x * (1 / scale * 127)), and
   outliers have none. A row's result by row depends on that row alone, bit for bit.

   Weights lie as [out / 64][in / 4][64][4] bytes, each code plus 128: vpdpbusd multiplies unsigned with signed,
   and the row's sums start at -128 times the sum of x's codes, which takes the 128 out again. */

#include "dot_avx512.h"

enum { FEATURES = 4 /* side by side */, OFFSET = 128 };

/* 1 / 127^2 as bitsandbytes writes it. */
#define DEQUANTIZE 6.200124e-05f

struct int8_linear {
    const bf16 *x; /* [rows, in] */
    bf16 *y;       /* [rows, out] */
    int64_t rows;
    int64_t in_features;  /* a multiple of 4 */
    int64_t out_features; /* a multiple of 64 */
    const uint8_t *codes;
    const float *scales; /* [out], the largest magnitude of each row of weights */
    const bf16 *bias;    /* [out], or null */
    double threshold;    /* a float16's value; 0: no outliers */
    int64_t by_row;      /* each row has outliers of its own */
};

typedef struct {
    const struct int8_linear *op;
    int8_t *x_codes;     /* [rows][in] */
    float *x_scales;     /* [rows] */
    int32_t *first_sums; /* [rows]: -128 times the sum of x's codes */
    uint64_t *flags;     /* [rows][flag_words]: bit i of word w: feature 64 w + i is an outlier */
    int64_t flag_words;  /* of a row */
    int64_t flag_stride; /* words from a row's to the next one's: 0 where all share theirs */
    float threshold;
} int8_call;

/* 16 features through float16; `mask` leaves out what lies behind the last one. */
INLINE __m512 load_x(const bf16 *from, __mmask16 mask) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(load_bf16(from, mask), _MM_FROUND_TO_NEAREST_INT));
}

INLINE __mmask16 reaches(__m512 x, float threshold) {
    return _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(threshold), _CMP_GE_OQ);
}

static void flag_tile(const void *arguments, int64_t tile) {
    const int8_call *call = arguments;
    for (int64_t row = tile * CHUNK_ROWS; row < smaller((tile + 1) * CHUNK_ROWS, call->op->rows); row++)
        for (int64_t i = 0; i < call->op->in_features; i += LANES) {
            __m512 x = load_x(call->op->x + row * call->op->in_features + i, lanes(call->op->in_features - i));
            __mmask16 found = reaches(x, call->threshold);
            if (found) __atomic_fetch_or(&call->flags[i / 64], (uint64_t)found << i % 64, __ATOMIC_RELAXED);
        }
}

static void quantize_tile(const void *arguments, int64_t tile) {
    const int8_call *call = arguments;
    for (int64_t row = tile * CHUNK_ROWS; row < smaller((tile + 1) * CHUNK_ROWS, call->op->rows); row++) {
        const bf16 *x = call->op->x + row * call->op->in_features;
        uint64_t *flags = call->flags + row * call->flag_stride;
        for (int64_t word = 0; call->flag_stride && word < call->flag_words; word++) flags[word] = 0;
        __m512 most = _mm512_setzero_ps();
        for (int64_t i = 0; i < call->op->in_features; i += LANES) {
            __m512 some = load_x(x + i, lanes(call->op->in_features - i));
            __mmask16 found = call->threshold > 0 ? reaches(some, call->threshold) : 0;
            if (call->flag_stride) flags[i / 64] |= (uint64_t)found << i % 64;
            most = _mm512_mask_max_ps(most, (__mmask16)~found, most, _mm512_abs_ps(some));
        }
        const float scale = _mm512_reduce_max_ps(most);
        const __m512 factor = _mm512_set1_ps(1 / scale * 127);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < call->op->in_features; i += LANES) {
            __mmask16 inside = lanes(call->op->in_features - i);
            __mmask16 kept = inside & (__mmask16)~(flags[i / 64] >> i % 64);
            if (scale == 0) kept = 0; /* 0 times infinity has no code */
            __m512 scaled = _mm512_mul_ps(load_x(x + i, inside), factor);
            __m512i codes = _mm512_maskz_cvt_roundps_epi32(kept, scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            sum = _mm512_add_epi32(sum, codes);
            _mm512_mask_cvtepi32_storeu_epi8(call->x_codes + row * call->op->in_features + i, inside, codes);
        }
        call->x_scales[row] = scale;
        call->first_sums[row] = -OFFSET * _mm512_reduce_add_epi32(sum);
    }
}

/* values += x * weight over each row's outliers, for one block. A code is taken apart once for all rows; where it
   is no outlier x counts as 0, which leaves the sum as it is. */
INLINE void add_outliers(const int rows, const int8_call *call, int64_t block, int64_t row,
                         __m512 values[MOST_ROWS][COLUMNS]) {
    const uint64_t *flags = call->flags + row * call->flag_stride;
    uint64_t any = 0;
    for (int64_t word = 0; word < call->flag_words; word++)
        UNROLL for (int r = 0; r < rows; r++) any |= flags[r * call->flag_stride + word];
    if (!any) return;
    __m512 sums[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t word = 0; word < call->flag_words; word++) {
        uint64_t left = 0;
        UNROLL for (int r = 0; r < rows; r++) left |= flags[r * call->flag_stride + word];
        for (; left; left &= left - 1) {
            const int bit = __builtin_ctzll(left);
            const int64_t feature = word * 64 + bit;
            const uint8_t *codes = call->op->codes + (block * call->op->in_features + feature / FEATURES * FEATURES) * BLOCK;
            const __m128i shift = _mm_cvtsi32_si128((int)(feature % FEATURES) * 8);
            __m512 weights[COLUMNS];
            UNROLL for (int c = 0; c < COLUMNS; c++) {
                __m512i four = _mm512_loadu_si512(codes + c * LANES * FEATURES);
                __m512i code = _mm512_and_si512(_mm512_srl_epi32(four, shift), _mm512_set1_epi32(0xff));
                weights[c] = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, _mm512_set1_epi32(OFFSET)));
            }
            UNROLL for (int r = 0; r < rows; r++) {
                uint32_t is_outlier = flags[r * call->flag_stride + word] >> bit & 1;
                uint32_t bits = (uint32_t)call->op->x[(row + r) * call->op->in_features + feature] << 16;
                const __m512 x = _mm512_castsi512_ps(_mm512_set1_epi32((int)(bits & -is_outlier)));
                UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_fmadd_ps(x, weights[c], sums[r][c]);
            }
        }
    }
    UNROLL for (int c = 0; c < COLUMNS; c++) {
        __m512 scale = _mm512_loadu_ps(call->op->scales + block * BLOCK + c * LANES);
        scale = _mm512_mul_ps(scale, _mm512_set1_ps(1.0f / 127));
        UNROLL for (int r = 0; r < rows; r++) values[r][c] = _mm512_fmadd_ps(sums[r][c], scale, values[r][c]);
    }
}

/* vpdpbusd; around the intrinsic gcc 12 copies every sum back and forth, which halves the speed. */
INLINE __m512i add_products(__m512i sums, __m512i weights, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
    return sums;
}

INLINE void int8_rows(const int rows, const int8_call *call, int64_t block, int64_t row) {
    const int64_t quads = call->op->in_features / FEATURES;
    const uint32_t *x = (const uint32_t *)call->x_codes + row * quads;
    const uint8_t *weight = call->op->codes + block * BLOCK * call->op->in_features;
    __m512i sums[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_set1_epi32(call->first_sums[row + r]);
    for (int64_t quad = 0; quad < quads; quad++) {
        __m512i weights[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++)
            weights[c] = _mm512_loadu_si512(weight + (quad * BLOCK + c * LANES) * FEATURES);
        UNROLL for (int r = 0; r < rows; r++) {
            const __m512i four = _mm512_set1_epi32((int)x[r * quads + quad]);
            UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = add_products(sums[r][c], weights[c], four);
        }
    }
    __m512 values[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            __m512 scale = _mm512_loadu_ps(call->op->scales + block * BLOCK + c * LANES);
            scale = _mm512_mul_ps(_mm512_set1_ps(call->x_scales[row + r]), scale);
            values[r][c] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), scale), _mm512_set1_ps(DEQUANTIZE));
        }
    add_outliers(rows, call, block, row, values);
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++)
            store_outputs(call->op->y, call->op->bias, row + r, block * BLOCK + c * LANES, call->op->out_features, values[r][c]);
}

static void int8_tile(const void *arguments, int64_t tile) {
    const int8_call *call = arguments;
    const int64_t blocks = call->op->out_features / BLOCK, start = tile / blocks * CHUNK_ROWS;
    const int64_t end = smaller(start + CHUNK_ROWS, call->op->rows);
    for (int64_t row = start; row < end; row += MOST_ROWS)
        WITH_CONSTANT_ROWS(smaller(end - row, MOST_ROWS), int8_rows, call, tile % blocks, row)
}

/* x's codes, scales and outliers in the workspace. */
static void quantize(int8_call *call) {
    const int64_t rows = call->op->rows, in = call->op->in_features;
    const int by_row = call->op->by_row && call->threshold > 0;
    call->flag_words = (in + 63) / 64;
    call->flag_stride = by_row ? call->flag_words : 0;
    const int64_t all_flags = call->flag_words * (by_row ? rows : 1);
    char *space = workspace(8 * all_flags + 8 * rows + rows * in);
    call->flags = (uint64_t *)space;
    call->x_scales = (float *)(call->flags + all_flags);
    call->first_sums = (int32_t *)(call->x_scales + rows);
    call->x_codes = (int8_t *)(call->first_sums + rows);
    const int64_t tiles = (rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    if (!by_row) {
        for (int64_t word = 0; word < call->flag_words; word++) call->flags[word] = 0;
        if (call->threshold > 0) parallel(flag_tile, call, tiles);
    }
    parallel(quantize_tile, call, tiles);
}

EXPORT void halftone_int8_linear(const struct int8_linear *op) {
    int8_call call = {.op = op, .threshold = (float)op->threshold};
    quantize(&call);
    parallel(int8_tile, &call, linear_tiles(op->out_features, op->rows));
}

/* The first half alone, for tests: x's codes [rows, in], scales [rows] and flags [rows, in / 64 rounded up]. */
EXPORT void halftone_int8_quantize(const struct int8_linear *op, int8_t *codes, float *scales, uint64_t *flags) {
    int8_call call = {.op = op, .threshold = (float)op->threshold};
    quantize(&call);
    for (int64_t i = 0; i < op->rows * op->in_features; i++) codes[i] = call.x_codes[i];
    for (int64_t row = 0; row < op->rows; row++) {
        scales[row] = call.x_scales[row];
        for (int64_t word = 0; word < call.flag_words; word++)
            flags[row * call.flag_words + word] = call.flags[row * call.flag_stride + word];
    }
}
