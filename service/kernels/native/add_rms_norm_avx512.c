/* hidden + delta and its RMSNorm, with the roundings of kernels/add_rms_norm/reference.py. */

#include "vectors_avx512.h"

enum { TILE_ROWS = 8 };

struct add_rms_norm {
    const bf16 *hidden; /* [rows, columns] */
    const bf16 *delta;  /* the same, or null */
    const bf16 *weight; /* [columns] */
    bf16 *total;        /* [rows, columns] */
    bf16 *normed;       /* the same */
    int64_t rows, columns;
    double eps;
};

static void norm_row(const struct add_rms_norm *job, int64_t row) {
    int64_t n = job->columns, start = row * n;
    const bf16 *delta = job->delta;
    bf16 *total = job->total + start, *normed = job->normed + start;
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 x = load_bf16(job->hidden + start + i, mask);
        if (delta) x = through_bf16(_mm512_add_ps(x, load_bf16(delta + start + i, mask)));
        store_bf16(total + i, x, mask);
        __m512 sum = _mm512_fmadd_ps(x, x, even);
        even = odd;
        odd = sum;
    }
    __m512 factor = rms_factor(_mm512_add_ps(even, odd), n, (float)job->eps);
    for (int64_t i = 0; i < n; i += 16) {
        __mmask16 mask = lanes(n - i);
        __m512 x = through_bf16(_mm512_mul_ps(load_bf16(total + i, mask), factor));
        store_bf16(normed + i, _mm512_mul_ps(x, load_bf16(job->weight + i, mask)), mask);
    }
}

static void norm_rows(const void *arguments, int64_t tile) {
    const struct add_rms_norm *job = arguments;
    int64_t end = smaller(job->rows, (tile + 1) * TILE_ROWS);
    for (int64_t row = tile * TILE_ROWS; row < end; row++) norm_row(job, row);
}

EXPORT void halftone_add_rms_norm(const struct add_rms_norm *job) {
    parallel(norm_rows, job, (job->rows + TILE_ROWS - 1) / TILE_ROWS);
}
