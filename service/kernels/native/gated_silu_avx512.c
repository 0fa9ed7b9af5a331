/* silu(gate) * up in float32, rounded once. */

#include "vectors_avx512.h"

enum { TILE_NUMBERS = 4096 };

struct gated_silu {
    const bf16 *gate_up; /* [rows, 2 * columns] */
    bf16 *result;        /* [rows, columns] */
    int64_t rows, columns;
};

static int64_t tile_rows(const struct gated_silu *job) {
    return job->columns >= TILE_NUMBERS ? 1 : TILE_NUMBERS / job->columns;
}

static void gate_rows(const void *arguments, int64_t tile) {
    const struct gated_silu *job = arguments;
    const __m512 one = _mm512_set1_ps(1.0f);
    int64_t n = job->columns, rows = tile_rows(job), end = smaller(job->rows, (tile + 1) * rows);
    for (int64_t row = tile * rows; row < end; row++) {
        const bf16 *gate = job->gate_up + row * 2 * n, *up = gate + n;
        for (int64_t i = 0; i < n; i += 16) {
            __mmask16 mask = lanes(n - i);
            __m512 x = load_bf16(gate + i, mask);
            __m512 falling = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
            __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, falling));
            store_bf16(job->result + row * n + i, _mm512_mul_ps(silu, load_bf16(up + i, mask)), mask);
        }
    }
}

EXPORT void halftone_gated_silu(const struct gated_silu *job) {
    int64_t rows = tile_rows(job);
    parallel(gate_rows, job, (job->rows + rows - 1) / rows);
}
