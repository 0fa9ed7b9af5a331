/* bf16 weights [out / 64][in / 2][64][2]: y = x W^T + bias, and rows of W where it is an embedding too. */

#include "dot_avx512.h"

struct dense_linear {
    const bf16 *x; /* [rows, in] */
    bf16 *y;       /* [rows, out] */
    int64_t rows;
    int64_t in_features;  /* even */
    int64_t out_features; /* a multiple of 64 */
    const bf16 *weight;
    const bf16 *bias; /* [out], or null */
};

INLINE void some_rows(const int rows, const struct dense_linear *call, int64_t block, int64_t row) {
    const int64_t pairs = call->in_features / 2;
    const bf16 *weight = call->weight + block * BLOCK * call->in_features;
    const uint32_t *x = (const uint32_t *)call->x + row * pairs;
    __m512 sums[MOST_ROWS][COLUMNS];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++) sums[r][c] = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i weights[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++)
            weights[c] = _mm512_loadu_si512(weight + (pair * BLOCK + c * LANES) * 2);
        dot_pair(rows, sums, weights, x + pair, pairs);
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < COLUMNS; c++)
            store_outputs(call->y, call->bias, row + r, block * BLOCK + c * LANES, call->out_features, sums[r][c]);
}

static void dense_tile(const void *arguments, int64_t tile) {
    const struct dense_linear *call = arguments;
    const int64_t blocks = call->out_features / BLOCK, start = tile / blocks * CHUNK_ROWS;
    const int64_t end = smaller(start + CHUNK_ROWS, call->rows);
    for (int64_t row = start; row < end; row += MOST_ROWS)
        WITH_CONSTANT_ROWS(smaller(end - row, MOST_ROWS), some_rows, call, tile % blocks, row)
}

EXPORT void halftone_dense_linear(const struct dense_linear *call) {
    parallel(dense_tile, call, linear_tiles(call->out_features, call->rows));
}

struct dense_rows {
    const uint32_t *weight;
    const int64_t *ids; /* [count], each a row of the weight */
    uint32_t *rows;     /* [count, pairs] */
    int64_t count;
    int64_t pairs; /* of features */
    int64_t num_rows;
};

static void lookup_tile(const void *arguments, int64_t tile) {
    const struct dense_rows *call = arguments;
    const int64_t id = call->ids[tile], pairs = call->pairs;
    const uint32_t *from = call->weight + id / BLOCK * pairs * BLOCK + id % BLOCK;
    for (int64_t pair = 0; pair < pairs; pair++) call->rows[tile * pairs + pair] = from[pair * BLOCK];
}

/* Returns how many ids name no row; nothing is read then. */
EXPORT int64_t halftone_dense_rows(const struct dense_rows *call) {
    int64_t wrong = 0;
    for (int64_t i = 0; i < call->count; i++) wrong += (uint64_t)call->ids[i] >= (uint64_t)call->num_rows;
    if (!wrong) parallel(lookup_tile, call, call->count);
    return wrong;
}
