/* Attention of one query a sequence over the pages of its keys and values, softmax online in float32.

   A tile is one sequence, one KV head and one span of its tokens, with all query heads that share the KV head.
   Spans are cut at multiples of SPAN tokens whatever else is in the batch, and a row's partial results are
   joined in their order, so a row's result depends on neither its neighbours nor the number of threads. */

#include "vectors_avx512.h"

#define INLINE static inline __attribute__((always_inline))

enum {
    PAGE = 16,         /* tokens of a block: one register of scores */
    CHUNK = 128,       /* tokens whose scores are held at a time */
    SPAN = 512,        /* tokens of a tile */
    MAX_HEADS = 8,     /* query heads at a time */
    MAX_HEAD_DIM = 256
};

struct decode_attention {
    const bf16 *q;             /* [sequences, kv_heads * group, head_dim] */
    const bf16 *keys, *values; /* [blocks, kv_heads, PAGE, head_dim] */
    const int32_t *tables;     /* [sequences, table_blocks] */
    const int32_t *lengths;    /* [sequences] */
    bf16 *result;              /* as q */
    float *partials;           /* [sequences, heads, spans, head_dim + 2], if spans > 1 */
    int64_t sequences, kv_heads, group, head_dim, table_blocks, num_blocks, spans, window;
    double scale, softcap;
};

struct heads {
    const bf16 *q;
    int64_t count;
    float largest[MAX_HEADS], sum[MAX_HEADS];
    float scores[MAX_HEADS][CHUNK];
    float out[MAX_HEADS][MAX_HEAD_DIM]; /* of each 32 columns the even ones, then the odd ones */
};

static int64_t first_token(const struct decode_attention *job, int64_t length) {
    return job->window && length > job->window ? length - job->window : 0;
}

static const bf16 *page(const struct decode_attention *job, const bf16 *cache, int64_t sequence, int64_t token,
                        int64_t kv_head) {
    int64_t block = job->tables[sequence * job->table_blocks + token / PAGE];
    return cache + (block * job->kv_heads + kv_head) * PAGE * job->head_dim;
}

static void prefetch(const bf16 *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 32) _mm_prefetch((const char *)(from + i), _MM_HINT_T0);
}

/* Sixteen sums, lane i of the result that of parts[i]'s lanes. */
static inline __m512 sums_of_lanes(const __m512 parts[16]) {
    __m512 quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 *p = parts + 4 * i;
        __m512d a = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(p[0], p[1]), _mm512_unpackhi_ps(p[0], p[1])));
        __m512d b = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(p[2], p[3]), _mm512_unpackhi_ps(p[2], p[3])));
        quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 left = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88),
                                _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    __m512 right = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88),
                                 _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
}

/* Scaled scores of one page; the lanes outside `seen` become -inf. */
INLINE void score_page(struct heads *heads, const bf16 *keys, int64_t n, int64_t at,
                                                             __mmask16 seen, float scale, float softcap) {
    for (int64_t head = 0; head < heads->count; head++) {
        __m512 parts[PAGE];
#pragma GCC unroll 16
        for (int token = 0; token < PAGE; token++) parts[token] = _mm512_setzero_ps();
#pragma GCC unroll 4
        for (int64_t i = 0; i < n; i += 32) {
            __m512bh q = (__m512bh)_mm512_loadu_si512(heads->q + head * n + i);
#pragma GCC unroll 16
            for (int token = 0; token < PAGE; token++)
                parts[token] = _mm512_dpbf16_ps(parts[token], q, (__m512bh)_mm512_loadu_si512(keys + token * n + i));
        }
        __m512 scores = _mm512_mul_ps(sums_of_lanes(parts), _mm512_set1_ps(scale));
        if (softcap != 0) scores = capped(scores, softcap);
        _mm512_storeu_ps(heads->scores[head] + at, _mm512_mask_mov_ps(_mm512_set1_ps(-__builtin_inff()), seen, scores));
    }
}

/* Scores of `count` tokens, whole pages, become weights relative to the largest so far. */
INLINE void weigh(struct heads *heads, int64_t count, int64_t n) {
    for (int64_t head = 0; head < heads->count; head++) {
        float *scores = heads->scores[head], *out = heads->out[head];
        __m512 most = _mm512_loadu_ps(scores);
        for (int64_t i = PAGE; i < count; i += PAGE) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
        float before = heads->largest[head], now = _mm512_reduce_max_ps(most);
        now = now > before ? now : before;
        __m512 level = _mm512_set1_ps(now == -__builtin_inff() ? 0 : now);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < count; i += PAGE) {
            __m512 weights = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), level));
            _mm512_storeu_ps(scores + i, weights);
            sum = _mm512_add_ps(sum, weights);
        }
        __m512 shrink = exponential(_mm512_sub_ps(_mm512_set1_ps(before), level));
        if (now > before)
            for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(out + i, _mm512_mul_ps(shrink, _mm512_loadu_ps(out + i)));
        heads->sum[head] = heads->sum[head] * _mm512_cvtss_f32(shrink) + _mm512_reduce_add_ps(sum);
        heads->largest[head] = now;
    }
}

/* Adds tokens first .. last - 1 of a page to 32 * `parts` columns of `count` heads. */
INLINE void add_values(struct heads *heads, const bf16 *values, int64_t n,
                                                             int64_t at, int first, int last, int64_t head,
                                                             int64_t column, const int count, const int parts) {
    const __m512i upper = _mm512_set1_epi32((int)0xffff0000);
    __m512 sums[4][4];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 2 * parts; j++) sums[i][j] = _mm512_loadu_ps(heads->out[head + i] + column + 16 * j);
    for (int token = first; token < last; token++) {
        __m512 value[4];
#pragma GCC unroll 2
        for (int j = 0; j < parts; j++) {
            __m512i pairs = _mm512_loadu_si512(values + token * n + column + 32 * j);
            value[2 * j] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            value[2 * j + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
        }
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) {
            __m512 weight = _mm512_set1_ps(heads->scores[head + i][at + token]);
#pragma GCC unroll 4
            for (int j = 0; j < 2 * parts; j++) sums[i][j] = _mm512_fmadd_ps(weight, value[j], sums[i][j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 2 * parts; j++) _mm512_storeu_ps(heads->out[head + i] + column + 16 * j, sums[i][j]);
}

INLINE void add_page(struct heads *heads, const bf16 *values, int64_t n, int64_t at, int first, int last) {
    for (int64_t head = 0; head < heads->count; head += 4) {
        int64_t left = heads->count - head, column = 0;
        for (; column + 64 <= n; column += 64) {
            if (left == 1) add_values(heads, values, n, at, first, last, head, column, 1, 2);
            else if (left == 2) add_values(heads, values, n, at, first, last, head, column, 2, 2);
            else if (left == 3) add_values(heads, values, n, at, first, last, head, column, 3, 2);
            else add_values(heads, values, n, at, first, last, head, column, 4, 2);
        }
        if (column == n) continue;
        for (int64_t i = head; i < head + smaller(left, 4); i++)
            add_values(heads, values, n, at, first, last, i, column, 1, 1);
    }
}

/* Tokens begin .. end - 1 of a sequence for a few heads of one KV head. */
INLINE void attend_columns(const struct decode_attention *job, struct heads *heads, int64_t sequence, int64_t kv_head,
                           int64_t begin, int64_t end, const int64_t n) {
    for (int64_t head = 0; head < heads->count; head++) {
        heads->largest[head] = -__builtin_inff();
        heads->sum[head] = 0;
        for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(heads->out[head] + i, _mm512_setzero_ps());
    }
    for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
        int64_t from = (begin > chunk ? begin : chunk) / PAGE * PAGE, to = smaller(end, chunk + CHUNK);
        for (int64_t token = from; token < to; token += PAGE) {
            prefetch(page(job, job->values, sequence, token, kv_head), PAGE * n);
            int skipped = begin > token ? (int)(begin - token) : 0;
            __mmask16 seen = lanes(to - token) & (__mmask16)(0xffff << skipped);
            score_page(heads, page(job, job->keys, sequence, token, kv_head), n, token - from, seen, (float)job->scale,
                       (float)job->softcap);
        }
        weigh(heads, (to - from + PAGE - 1) / PAGE * PAGE, n);
        for (int64_t token = from; token < to; token += PAGE) {
            if (token + CHUNK < end) prefetch(page(job, job->keys, sequence, token + CHUNK, kv_head), PAGE * n);
            int first = begin > token ? (int)(begin - token) : 0, last = (int)smaller(to - token, PAGE);
            add_page(heads, page(job, job->values, sequence, token, kv_head), n, token - from, first, last);
        }
    }
}

/* The usual head_dims as constants: a row's address is then an offset, and a row of q stays in registers. */
static void attend(const struct decode_attention *job, struct heads *heads, int64_t sequence, int64_t kv_head,
                   int64_t begin, int64_t end) {
    if (job->head_dim == 64) attend_columns(job, heads, sequence, kv_head, begin, end, 64);
    else if (job->head_dim == 128) attend_columns(job, heads, sequence, kv_head, begin, end, 128);
    else attend_columns(job, heads, sequence, kv_head, begin, end, job->head_dim);
}

static void store_result(bf16 *result, const float *out, float sum, int64_t n) {
    __m512 total = _mm512_set1_ps(sum);
    for (int64_t i = 0; i < n; i += 32) {
        __m512i even = to_bf16(_mm512_div_ps(_mm512_loadu_ps(out + i), total));
        __m512i odd = to_bf16(_mm512_div_ps(_mm512_loadu_ps(out + i + 16), total));
        _mm512_storeu_si512(result + i, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
    }
}

static void attend_tile(const void *arguments, int64_t tile) {
    const struct decode_attention *job = arguments;
    int64_t kv_head = tile % job->kv_heads, sequence = tile / job->kv_heads % job->sequences;
    int64_t span = tile / job->kv_heads / job->sequences, n = job->head_dim, length = job->lengths[sequence];
    int64_t oldest = first_token(job, length), first_span = oldest / SPAN;
    int64_t begin = (first_span + span) * SPAN, end = smaller(length, begin + SPAN);
    if (begin >= length) return;
    if (begin < oldest) begin = oldest;
    int is_whole = span == 0 && end == length;
    for (int64_t head = 0; head < job->group; head += MAX_HEADS) {
        int64_t row = (sequence * job->kv_heads + kv_head) * job->group + head;
        struct heads heads;
        heads.q = job->q + row * n;
        heads.count = smaller(job->group - head, MAX_HEADS);
        attend(job, &heads, sequence, kv_head, begin, end);
        for (int64_t i = 0; i < heads.count; i++) {
            if (is_whole) {
                store_result(job->result + (row + i) * n, heads.out[i], heads.sum[i], n);
                continue;
            }
            float *partial = job->partials + ((row + i) * job->spans + span) * (n + 2);
            for (int64_t j = 0; j < n; j += 16) _mm512_storeu_ps(partial + j, _mm512_loadu_ps(heads.out[i] + j));
            partial[n] = heads.largest[i];
            partial[n + 1] = heads.sum[i];
        }
    }
}

/* One row's heads of a sequence that took several spans. */
static void join_spans(const void *arguments, int64_t sequence) {
    const struct decode_attention *job = arguments;
    int64_t n = job->head_dim, length = job->lengths[sequence], heads = job->kv_heads * job->group;
    int64_t count = (length - 1) / SPAN - first_token(job, length) / SPAN + 1;
    if (count == 1) return;
    for (int64_t row = sequence * heads; row < (sequence + 1) * heads; row++) {
        const float *partials = job->partials + row * job->spans * (n + 2);
        float out[MAX_HEAD_DIM], sum = 0, most = -__builtin_inff();
        for (int64_t span = 0; span < count; span++) {
            float largest = partials[span * (n + 2) + n];
            most = largest > most ? largest : most;
        }
        most = most == -__builtin_inff() ? 0 : most;
        for (int64_t i = 0; i < n; i += 16) _mm512_storeu_ps(out + i, _mm512_setzero_ps());
        for (int64_t span = 0; span < count; span++) {
            const float *partial = partials + span * (n + 2);
            __m512 share = exponential(_mm512_set1_ps(partial[n] - most));
            sum += _mm512_cvtss_f32(share) * partial[n + 1];
            for (int64_t i = 0; i < n; i += 16)
                _mm512_storeu_ps(out + i, _mm512_fmadd_ps(share, _mm512_loadu_ps(partial + i), _mm512_loadu_ps(out + i)));
        }
        store_result(job->result + row * n, out, sum, n);
    }
}

/* 0, or 1 + the first sequence with a length or a block outside its tables: then nothing was written. */
EXPORT int64_t halftone_decode_attention(const struct decode_attention *job) {
    for (int64_t sequence = 0; sequence < job->sequences; sequence++) {
        int64_t length = job->lengths[sequence], blocks = (length + PAGE - 1) / PAGE;
        if (length < 1 || blocks > job->table_blocks) return sequence + 1;
        if ((length - 1) / SPAN - first_token(job, length) / SPAN >= job->spans) return sequence + 1;
        const int32_t *table = job->tables + sequence * job->table_blocks;
        for (int64_t i = first_token(job, length) / PAGE; i < blocks; i++)
            if (table[i] < 0 || table[i] >= job->num_blocks) return sequence + 1;
    }
    parallel(attend_tile, job, job->sequences * job->kv_heads * job->spans);
    if (job->spans > 1) parallel(join_spans, job, job->sequences);
    return 0;
}
