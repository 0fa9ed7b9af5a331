/* Linears of 4-bit codes: a code names one of 16 bf16 levels, and a group of input features shares factors.

   y = x W^T + bias with W = factor * (level[code] - shift), the factor (and AWQ's shift) of the weight's group.
   Levels are multiplied with x as bf16, sums are float32, and a group's factor is applied to its sum: nothing
   else is rounded but y.

   Codes lie as [out / 64][in / 2][64] bytes. The 64 bytes are 32 lanes of 16 bits, lane 2 o + p for feature p of
   a pair; its nibble c is the code of output 16 c + o of the block. vpermw looks levels up by the low five bits
   of a lane: with the table there twice, the bit above a nibble does not matter, so that a nibble needs a shift
   and no mask. */

#include "dot_avx512.h"

enum { HALF_TABLE = 16, NF4_BLOCK = 64 };
enum kind { AWQ, NF4 };

struct awq_linear {
    const bf16 *x; /* [rows, in] */
    bf16 *y;       /* [rows, out] */
    int64_t rows;
    int64_t in_features;
    int64_t out_features; /* a multiple of 64 */
    const uint8_t *codes;
    const uint8_t *zeros;   /* [out / 64][groups][32]: nibble c of 16-bit lane o is output 16 c + o's */
    const uint16_t *scales; /* float16 [out / 64][groups][64] */
    const bf16 *bias;       /* [out], or null */
    int64_t group;          /* a multiple of 32 that divides in_features */
};

struct nf4_linear {
    const bf16 *x; /* [rows, in] */
    bf16 *y;       /* [rows, out] */
    int64_t rows;
    int64_t in_features;  /* a multiple of 64 */
    int64_t out_features; /* of each part a multiple of 64 */
    const uint8_t *codes;
    const bf16 *bias;            /* [out], or null */
    const float *absmax;         /* [out / 64][groups][64], or null under double quantization: then */
    const uint8_t *absmax_codes; /* the same */
    const float *map;            /* [256], what they mean */
    const float *nested;         /* times this, one for 256 codes of a part in its rows' order */
    const float *offsets;        /* [parts], plus this */
    const int64_t *parts;        /* [parts][2]: first row, first of `nested` */
    int64_t num_parts;
};

typedef struct {
    const bf16 *x, *bias;
    bf16 *y;
    const uint8_t *codes;
    int64_t rows, in_features, out_features, group;
    const struct awq_linear *awq;
    const float *x_sums; /* [rows][groups], of the features of each group */
    const struct nf4_linear *nf4;
} four_bit_call;

/* bf16 of codes -8 .. 7: AWQ's zero takes the rest. */
static const bf16 AWQ_LEVELS[HALF_TABLE] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                            0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

/* NF4's levels times NF4_STRETCH, which leaves the least error of all factors when they are rounded to bf16:
   3.2e-4 of absmax (root mean square) where the levels alone leave 5.5e-4. */
#define NF4_STRETCH 1.437005f
static const bf16 NF4_LEVELS[HALF_TABLE] = {0xbfb8, 0xbf80, 0xbf41, 0xbf11, 0xbed1, 0xbe88, 0xbe06, 0x0000,
                                            0x3dea, 0x3e6d, 0x3eb5, 0x3ef9, 0x3f22, 0x3f4f, 0x3f85, 0x3fb8};

INLINE __m512i load_table(const bf16 *levels) {
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)levels));
}

INLINE void decode_pair(__m512i weights[COLUMNS], const uint8_t *codes, __m512i table) {
    __m512i lanes = _mm512_loadu_si512(codes);
    UNROLL for (int c = 0; c < COLUMNS; c++)
        weights[c] = _mm512_permutexvar_epi16(_mm512_srli_epi16(lanes, 4 * c), table);
}

/* 8 - zero of the block's outputs in a group. */
INLINE void load_shifts(__m512 shifts[COLUMNS], const uint8_t *zeros) {
    const __m512 eight_less = _mm512_setr_ps(8, 7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7);
    __m512i lanes = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)zeros));
    UNROLL for (int c = 0; c < COLUMNS; c++)
        shifts[c] = _mm512_permutexvar_ps(_mm512_srli_epi32(lanes, 4 * c), eight_less);
}

/* absmax of the block's outputs in a group, from codes under double quantization. */
INLINE void decode_absmax(__m512 absmax[COLUMNS], const struct nf4_linear *call, int64_t block, int64_t group) {
    const int64_t groups = call->in_features / NF4_BLOCK;
    int64_t part = 0;
    while (part + 1 < call->num_parts && call->parts[2 * part + 2] <= block * BLOCK) part++;
    const int64_t row = block * BLOCK - call->parts[2 * part];
    const float *nested = call->nested + call->parts[2 * part + 1];
    const uint8_t *codes = call->absmax_codes + (block * groups + group) * BLOCK;
    const __m512i steps = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32((int)groups));
    UNROLL for (int c = 0; c < COLUMNS; c++) {
        __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(codes + c * LANES)));
        __m512i place = _mm512_add_epi32(steps, _mm512_set1_epi32((int)((row + c * LANES) * groups + group)));
        __m512 scale = _mm512_i32gather_ps(_mm512_srli_epi32(place, 8), nested, 4);
        __m512 value = _mm512_mul_ps(_mm512_i32gather_ps(code, call->map, 4), scale);
        absmax[c] = _mm512_add_ps(value, _mm512_set1_ps(call->offsets[part]));
    }
}

/* What a group's sums are multiplied with. */
INLINE void load_factors(const enum kind kind, __m512 factors[COLUMNS], const four_bit_call *call, int64_t block,
                         int64_t group) {
    const int64_t first = (block * (call->in_features / call->group) + group) * BLOCK;
    if (kind == AWQ) {
        UNROLL for (int c = 0; c < COLUMNS; c++)
            factors[c] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(call->awq->scales + first + c * LANES)));
        return;
    }
    if (call->nf4->absmax_codes)
        decode_absmax(factors, call->nf4, block, group);
    else
        UNROLL for (int c = 0; c < COLUMNS; c++) factors[c] = _mm512_loadu_ps(call->nf4->absmax + first + c * LANES);
    UNROLL for (int c = 0; c < COLUMNS; c++)
        factors[c] = _mm512_mul_ps(factors[c], _mm512_set1_ps(1 / NF4_STRETCH));
}

/* totals += factor * (the group's sums), for some rows.

   Codes are decoded anew for every six rows: that runs beside the products, where storing what was decoded and
   loading it again costs more time at any number of rows. */
INLINE void add_group(const int rows, const enum kind kind, const four_bit_call *call, int64_t block, int64_t group,
                      int64_t row, const __m512 shifts[COLUMNS], const __m512 factors[COLUMNS],
                      __m512 totals[][COLUMNS]) {
    const int64_t groups = call->in_features / call->group, stride = call->in_features / 2, pairs = call->group / 2;
    const uint32_t *x = (const uint32_t *)call->x + row * stride + group * pairs;
    const uint8_t *codes = call->codes + (block * stride + group * pairs) * BLOCK;
    const __m512i table = load_table(kind == AWQ ? AWQ_LEVELS : NF4_LEVELS);
    __m512 sums[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++) {
        const __m512 x_sum = kind == AWQ ? _mm512_set1_ps(call->x_sums[(row + r) * groups + group]) : _mm512_setzero_ps();
        UNROLL for (int c = 0; c < COLUMNS; c++)
            sums[r][c] = kind == AWQ ? _mm512_mul_ps(shifts[c], x_sum) : _mm512_setzero_ps();
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i weights[COLUMNS];
        decode_pair(weights, codes + pair * BLOCK, table);
        dot_pair(rows, sums, weights, x + pair, stride);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++)
            totals[r][c] = _mm512_fmadd_ps(sums[r][c], factors[c], totals[r][c]);
}

INLINE void four_bit_tile(const enum kind kind, const four_bit_call *call, int64_t tile) {
    const int64_t blocks = call->out_features / BLOCK, groups = call->in_features / call->group;
    const int64_t block = tile % blocks, start = tile / blocks * CHUNK_ROWS;
    const int64_t end = smaller(start + CHUNK_ROWS, call->rows);
    __m512 totals[CHUNK_ROWS][COLUMNS];
    for (int64_t r = 0; r < end - start; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) totals[r][c] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        __m512 shifts[COLUMNS], factors[COLUMNS];
        if (kind == AWQ) load_shifts(shifts, call->awq->zeros + (block * groups + group) * BLOCK / 2);
        load_factors(kind, factors, call, block, group);
        for (int64_t row = start; row < end; row += MOST_ROWS)
            WITH_CONSTANT_ROWS(smaller(end - row, MOST_ROWS), add_group, kind, call, block, group, row, shifts, factors,
                               totals + (row - start))
    }
    for (int64_t r = 0; r < end - start; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++)
            store_outputs(call->y, call->bias, start + r, block * BLOCK + c * LANES, call->out_features, totals[r][c]);
}

static void awq_tile(const void *call, int64_t tile) { four_bit_tile(AWQ, call, tile); }

static void nf4_tile(const void *call, int64_t tile) { four_bit_tile(NF4, call, tile); }

/* Sums of x by group, which the zeros multiply. */
static void sum_tile(const void *arguments, int64_t tile) {
    const four_bit_call *call = arguments;
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    const int64_t groups = call->in_features / call->group;
    for (int64_t row = tile * CHUNK_ROWS; row < smaller((tile + 1) * CHUNK_ROWS, call->rows); row++)
        for (int64_t group = 0; group < groups; group++) {
            const bf16 *x = call->x + row * call->in_features + group * call->group;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < call->group; i += 2 * LANES)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(x + i), ones);
            ((float *)call->x_sums)[row * groups + group] = _mm512_reduce_add_ps(sum);
        }
}

EXPORT void halftone_awq_linear(const struct awq_linear *op) {
    const int64_t sums = op->rows * (op->in_features / op->group);
    const four_bit_call call = {.x = op->x, .bias = op->bias, .y = op->y, .codes = op->codes, .rows = op->rows,
                                .in_features = op->in_features, .out_features = op->out_features,
                                .group = op->group, .awq = op, .x_sums = workspace(sums * (int64_t)sizeof(float))};
    parallel(sum_tile, &call, (op->rows + CHUNK_ROWS - 1) / CHUNK_ROWS);
    parallel(awq_tile, &call, linear_tiles(op->out_features, op->rows));
}

EXPORT void halftone_nf4_linear(const struct nf4_linear *op) {
    const four_bit_call call = {.x = op->x, .bias = op->bias, .y = op->y, .codes = op->codes, .rows = op->rows,
                                .in_features = op->in_features, .out_features = op->out_features,
                                .group = NF4_BLOCK, .nf4 = op};
    parallel(nf4_tile, &call, linear_tiles(op->out_features, op->rows));
}
