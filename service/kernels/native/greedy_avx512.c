/* The largest of each row of logits, the first among equals, and whether the row holds only numbers. */

#include "vectors_avx512.h"

enum { INFINITE_OR_NAN = 0x01 | 0x08 | 0x10 | 0x80 }; /* vfpclassps: quiet NaN, inf, -inf, signalling NaN */

struct greedy {
    const float *logits; /* [rows, columns] */
    int64_t *token_ids;  /* [rows]; -1: an infinity or NaN is in the row */
    int64_t rows, columns;
};

static void pick(const void *arguments, int64_t row) {
    const struct greedy *job = arguments;
    const __m512 lowest = _mm512_set1_ps(-__builtin_inff());
    const float *logits = job->logits + row * job->columns;
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), place = index;
    __m512 largest = lowest;
    __mmask16 broken = 0;
    for (int64_t i = 0; i < job->columns; i += 16) {
        __mmask16 mask = lanes(job->columns - i);
        __m512 x = _mm512_mask_loadu_ps(lowest, mask, logits + i);
        broken |= _mm512_mask_fpclass_ps_mask(mask, x, INFINITE_OR_NAN);
        __mmask16 greater = _mm512_cmp_ps_mask(x, largest, _CMP_GT_OQ);
        largest = _mm512_mask_mov_ps(largest, greater, x);
        place = _mm512_mask_mov_epi32(place, greater, index);
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    __mmask16 equal = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(_mm512_reduce_max_ps(largest)), _CMP_EQ_OQ);
    job->token_ids[row] = broken ? -1 : _mm512_mask_reduce_min_epi32(equal, place);
}

EXPORT void halftone_greedy(const struct greedy *job) { parallel(pick, job, job->rows); }
