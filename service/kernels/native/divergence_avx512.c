/* What likelihood and divergence need of rows of float32 logits, every term and sum in float64.

   A logit counts as its distance to the row's largest. What is no number needs no branch: NaN, inf and a row
   of -inf alone make a distance NaN, and -inf is a weight of 0, whose product with an infinite distance is NaN
   as in torch. */

#include "vectors_avx512.h"

enum { PIECE = 512 }; /* columns that are summed before the row's sum: fewer roundings lie behind one another */

struct likelihood {
    const float *logits; /* [rows, columns] */
    double *largest;     /* [rows] */
    double *sums;        /* [rows] of e^(x - largest) */
    int64_t rows, columns;
};

struct divergence {
    const float *reference, *other; /* [rows, columns] */
    double *reference_sums;         /* [rows] of e^(x - largest), of each its own */
    double *other_sums;
    double *weighted; /* [rows] of the reference's e^(x - largest) times the difference of both distances */
    int64_t rows, columns;
};

/* e^x for x <= 0 within 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].

   Ends in 0, and NaN stays NaN: max returns its second operand for it. */
static inline __m512d falling(__m512d x) {
    x = _mm512_max_pd(_mm512_set1_pd(-800.0), x);
    __m512d n =
        _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(0x1.71547652b82fep+0)), _MM_FROUND_TO_NEAREST_INT);
    __m512d r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.62e42fefa39efp-1), x);
    r = _mm512_fnmadd_pd(n, _mm512_set1_pd(0x1.abc9e3b39803fp-56), r);
    __m512d y = _mm512_set1_pd(0x1.6124613a86d09p-33); /* 1 / 13!, and so on to 1 / 0! */
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.1eed8eff8d898p-29));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.ae64567f544e4p-26));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.27e4fb7789f5cp-22));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.71de3a556c734p-19));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.a01a01a01a01ap-16));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.a01a01a01a01ap-13));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.6c16c16c16c17p-10));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.1111111111111p-7));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.5555555555555p-5));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0x1.5555555555555p-3));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(0.5));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(1.0));
    y = _mm512_fmadd_pd(y, r, _mm512_set1_pd(1.0));
    return _mm512_scalef_pd(y, n);
}

/* NaN may be passed over: its distance is NaN. */
static float largest_of(const float *logits, int64_t columns) {
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    __m512 largest = lowest;
    for (int64_t i = 0; i < columns; i += 16)
        largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(lowest, lanes(columns - i), logits + i));
    return _mm512_reduce_max_ps(largest);
}

/* Eight of a row. */
static inline __m512d distances(const float *logits, __mmask8 mask, __m512d largest) {
    return _mm512_sub_pd(_mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, logits)), largest);
}

static void sum_row(const void *arguments, int64_t row) {
    const struct likelihood *job = arguments;
    const float *logits = job->logits + row * job->columns;
    job->largest[row] = largest_of(logits, job->columns);
    __m512d largest = _mm512_set1_pd(job->largest[row]), total = _mm512_setzero_pd();
    for (int64_t start = 0; start < job->columns; start += PIECE) {
        int64_t end = smaller(start + PIECE, job->columns);
        __m512d sum = _mm512_setzero_pd();
        for (int64_t i = start; i < end; i += 8) {
            __mmask8 mask = (__mmask8)lanes(end - i);
            sum = _mm512_mask_add_pd(sum, mask, sum, falling(distances(logits + i, mask, largest)));
        }
        total = _mm512_add_pd(total, sum);
    }
    job->sums[row] = _mm512_reduce_add_pd(total);
}

static void compare_row(const void *arguments, int64_t row) {
    const struct divergence *job = arguments;
    const float *p = job->reference + row * job->columns, *q = job->other + row * job->columns;
    const __m512d zero = _mm512_setzero_pd();
    __m512d p_largest = _mm512_set1_pd(largest_of(p, job->columns)), p_total = zero;
    __m512d q_largest = _mm512_set1_pd(largest_of(q, job->columns)), q_total = zero, weighted_total = zero;
    for (int64_t start = 0; start < job->columns; start += PIECE) {
        int64_t end = smaller(start + PIECE, job->columns);
        __m512d p_sum = zero, q_sum = zero, weighted = zero;
        for (int64_t i = start; i < end; i += 8) {
            __mmask8 mask = (__mmask8)lanes(end - i);
            __m512d p_distance = distances(p + i, mask, p_largest), q_distance = distances(q + i, mask, q_largest);
            __m512d weight = falling(p_distance);
            p_sum = _mm512_mask_add_pd(p_sum, mask, p_sum, weight);
            q_sum = _mm512_mask_add_pd(q_sum, mask, q_sum, falling(q_distance));
            weighted = _mm512_mask3_fmadd_pd(weight, _mm512_sub_pd(p_distance, q_distance), weighted, mask);
        }
        p_total = _mm512_add_pd(p_total, p_sum);
        q_total = _mm512_add_pd(q_total, q_sum);
        weighted_total = _mm512_add_pd(weighted_total, weighted);
    }
    job->reference_sums[row] = _mm512_reduce_add_pd(p_total);
    job->other_sums[row] = _mm512_reduce_add_pd(q_total);
    job->weighted[row] = _mm512_reduce_add_pd(weighted_total);
}

EXPORT void halftone_likelihood(const struct likelihood *job) { parallel(sum_row, job, job->rows); }

EXPORT void halftone_divergence(const struct divergence *job) { parallel(compare_row, job, job->rows); }
