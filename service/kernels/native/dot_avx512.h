/* The inner product that all bf16 linears share: up to six rows of x against a block of 64 outputs.

   A block's weights lie as [in / 2][64][2], the two of a pair of features side by side, so that one vdpbf16ps
   adds both products of a pair to 16 outputs. Six rows by four times 16 outputs are 24 sums, which with four
   weights and an x fill the registers. Each sum takes its pairs in their order, one by one, so a row's result
   does not depend on the rows that it is computed with. */

#ifndef DOT_AVX512_H
#define DOT_AVX512_H

#include "vectors_avx512.h"

enum {
    BLOCK = 64,     /* outputs */
    LANES = 16,     /* outputs in a register */
    COLUMNS = 4,    /* registers in a block */
    MOST_ROWS = 6,  /* at once */
    CHUNK_ROWS = 48 /* in a tile, so that long prompts make tiles enough for many threads */
};

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

/* FUNCTION(rows, ...) with `rows`, 1 .. MOST_ROWS, as a constant. */
#define WITH_CONSTANT_ROWS(rows, FUNCTION, ...)      \
    switch (rows) {                                  \
    case 1: FUNCTION(1, __VA_ARGS__); break;         \
    case 2: FUNCTION(2, __VA_ARGS__); break;         \
    case 3: FUNCTION(3, __VA_ARGS__); break;         \
    case 4: FUNCTION(4, __VA_ARGS__); break;         \
    case 5: FUNCTION(5, __VA_ARGS__); break;         \
    case 6: FUNCTION(6, __VA_ARGS__); break;         \
    }

/* One pair of features: `x` points at the first row's, the others' lie `stride` pairs apart. */
INLINE void dot_pair(const int rows, __m512 sums[MOST_ROWS][COLUMNS], const __m512i weights[COLUMNS],
                     const uint32_t *x, int64_t stride) {
    UNROLL for (int r = 0; r < rows; r++) {
        __m512bh both = (__m512bh)_mm512_set1_epi32((int)x[r * stride]);
        UNROLL for (int c = 0; c < COLUMNS; c++)
            sums[r][c] = _mm512_dpbf16_ps(sums[r][c], both, (__m512bh)weights[c]);
    }
}

/* y[row][column ..] = 16 floats, plus the bias if there is one, rounded once to nearest even. */
INLINE void store_outputs(bf16 *y, const bf16 *bias, int64_t row, int64_t column, int64_t out_features, __m512 value) {
    if (bias) value = _mm512_add_ps(value, load_bf16(bias + column, 0xffff));
    _mm256_storeu_si256((__m256i *)(y + row * out_features + column), (__m256i)_mm512_cvtneps_pbh(value));
}

/* Tiles of a linear: blocks of outputs, for each chunk of rows. */
INLINE int64_t linear_tiles(int64_t out_features, int64_t rows) {
    return out_features / BLOCK * ((rows + CHUNK_ROWS - 1) / CHUNK_ROWS);
}

#endif
