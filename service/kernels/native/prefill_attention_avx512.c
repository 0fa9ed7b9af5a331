/* Attention of chunks of prompts over the pages of their keys and values, softmax online in float32.

   A tile is some queries of one chunk with all query heads that share a KV head: up to 32 rows of Q, against 64
   keys at a time. Keys and values are laid in pairs, for vdpbf16ps, once for all rows of the tile. Blocks of keys
   begin at multiples of 64 tokens and a row sums them in their order, so its result depends neither on how its
   prompt was cut into chunks nor on its neighbours; weights are rounded to bf16 before they meet the values. */

#include "vectors_avx512.h"

enum {
    PAGE = 16,
    KEYS = 64,          /* of a block: four registers of scores */
    MAX_ROWS = 36,      /* 32, made up to a multiple of STRIP */
    STRIP = 6,          /* rows whose 4 registers of sums each are held at once */
    MAX_HEAD_DIM = 128  /* a multiple of 64 */
};

struct prefill_attention {
    const bf16 *q;             /* [tokens, kv_heads * group, head_dim] */
    const bf16 *keys, *values; /* [blocks, kv_heads, PAGE, head_dim] */
    const int32_t *tables;     /* [sequences, table_blocks] */
    const int32_t *lengths;    /* [sequences], this chunk's tokens included */
    const int32_t *starts;     /* [sequences + 1], first token of each chunk in q */
    const int32_t *tiles;      /* [num_tiles, 2], sequence and first query in its chunk */
    bf16 *result;              /* as q */
    int64_t num_tiles, tile_queries, kv_heads, group, head_dim, table_blocks, num_blocks, window;
    double scale, softcap;
};

struct tile {
    const struct prefill_attention *job;
    int64_t sequence, kv_head, first, count; /* queries first .. first + count - 1 of q */
    int64_t position;                        /* of the first query in its sequence */
    float largest[MAX_ROWS], sum[MAX_ROWS];
    _Alignas(64) bf16 q[MAX_ROWS * MAX_HEAD_DIM];
    _Alignas(64) float out[MAX_ROWS * MAX_HEAD_DIM];
    _Alignas(64) float scores[MAX_ROWS * KEYS];           /* then, in the first half of each row, weights in bf16 */
    _Alignas(64) uint32_t pairs[MAX_HEAD_DIM / 2 * KEYS]; /* of keys [head_dim / 2][KEYS], then values [KEYS / 2][head_dim] */
};

static int64_t oldest_seen(const struct prefill_attention *job, int64_t position) {
    return job->window && position >= job->window ? position - job->window + 1 : 0;
}

static const bf16 *page(const struct tile *t, const bf16 *cache, int64_t token) {
    const struct prefill_attention *job = t->job;
    int64_t block = job->tables[t->sequence * job->table_blocks + token / PAGE];
    return cache + (block * job->kv_heads + t->kv_head) * PAGE * job->head_dim;
}

/* Sixteen rows of sixteen 32-bit words -> their columns, KEYS words apart. */
static void transpose(const bf16 *from, int64_t stride, uint32_t *to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm512_store_si512(to + i * KEYS, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_store_si512(to + (i + 4) * KEYS, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        _mm512_store_si512(to + (i + 8) * KEYS, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        _mm512_store_si512(to + (i + 12) * KEYS, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

/* Keys token .. end - 1. The columns behind them keep what was there: their scores are masked. */
static void pair_keys(struct tile *t, int64_t token, int64_t end) {
    int64_t n = t->job->head_dim;
    for (int64_t at = 0; at < KEYS && token + at < end; at += PAGE) {
        const bf16 *keys = page(t, t->job->keys, token + at);
        for (int64_t i = 0; i < n; i += 32) transpose(keys + i, n, t->pairs + i / 2 * KEYS + at);
    }
}

/* Values of the block's tokens from `begin` to end - 1, else zeros: a weight of 0 times garbage may be NaN. */
static void pair_values(struct tile *t, int64_t token, int64_t begin, int64_t end) {
    int64_t n = t->job->head_dim;
    __m512i order[2]; /* word i of the one row, word i of the other */
    uint16_t *places = (uint16_t *)order;
    for (int i = 0; i < 64; i++) places[i] = (uint16_t)(i / 2 + (i & 1) * 32);
    for (int64_t at = 0; at < KEYS; at += 2) {
        uint32_t *to = t->pairs + at / 2 * n;
        const int64_t first = token + at, second = first + 1;
        const bf16 *values = first < end ? page(t, t->job->values, first) + first % PAGE * n : 0;
        for (int64_t i = 0; i < n; i += 32) {
            __m512i even = _mm512_setzero_si512(), odd = even;
            if (first >= begin && first < end) even = _mm512_loadu_si512(values + i);
            if (second >= begin && second < end) odd = _mm512_loadu_si512(values + n + i);
            _mm512_store_si512(to + i, _mm512_permutex2var_epi16(even, order[0], odd));
            _mm512_store_si512(to + i + 16, _mm512_permutex2var_epi16(even, order[1], odd));
        }
    }
}

/* sums[r][64] (+)= STRIP rows of x, `count` pairs each, `stride` apart, times 64 columns of pairs, `width` wide. */
static inline __attribute__((always_inline)) void multiply(float *to, int64_t to_stride, const uint32_t *x, int64_t stride,
                                                           const uint32_t *pairs, int64_t width, int64_t count,
                                                           const int adds) {
    __m512 sums[STRIP][4];
#pragma GCC unroll 6
    for (int row = 0; row < STRIP; row++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) sums[row][i] = adds ? _mm512_load_ps(to + row * to_stride + 16 * i) : _mm512_setzero_ps();
    for (int64_t pair = 0; pair < count; pair++) {
        __m512bh column[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) column[i] = (__m512bh)_mm512_load_si512(pairs + pair * width + 16 * i);
#pragma GCC unroll 6
        for (int row = 0; row < STRIP; row++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32((int)x[row * stride + pair]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[row][i] = _mm512_dpbf16_ps(sums[row][i], both, column[i]);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < STRIP; row++)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) _mm512_store_ps(to + row * to_stride + 16 * i, sums[row][i]);
}

/* A row's 64 products become weights in bf16; keys outside first .. last of the block are not seen. */
static void weigh_row(struct tile *t, int64_t row, int64_t first, int64_t last) {
    const struct prefill_attention *job = t->job;
    float *scores = t->scores + row * KEYS, *out = t->out + row * job->head_dim;
    const __m512 scale = _mm512_set1_ps((float)job->scale), nothing = _mm512_set1_ps(-__builtin_inff());
    uint64_t seen = last < 0 ? 0 : ~0ull >> (last >= 63 ? 0 : 63 - last);
    if (first > 0) seen = first > 63 ? 0 : seen & ~0ull << first;
    __m512 parts[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        parts[i] = _mm512_mul_ps(_mm512_load_ps(scores + 16 * i), scale);
        if (job->softcap != 0) parts[i] = capped(parts[i], (float)job->softcap);
        parts[i] = _mm512_mask_mov_ps(nothing, (__mmask16)(seen >> 16 * i), parts[i]);
    }
    float before = t->largest[row];
    float now = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(parts[0], parts[1]), _mm512_max_ps(parts[2], parts[3])));
    now = now > before ? now : before;
    __m512 level = _mm512_set1_ps(now == -__builtin_inff() ? 0 : now), sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        parts[i] = exponential(_mm512_sub_ps(parts[i], level));
        sum = _mm512_add_ps(sum, parts[i]);
    }
    _mm512_store_si512(scores, (__m512i)_mm512_cvtne2ps_pbh(parts[1], parts[0]));
    _mm512_store_si512(scores + 16, (__m512i)_mm512_cvtne2ps_pbh(parts[3], parts[2]));
    __m512 shrink = exponential(_mm512_sub_ps(_mm512_set1_ps(before), level));
    if (now > before)
        for (int64_t i = 0; i < job->head_dim; i += 16) _mm512_store_ps(out + i, _mm512_mul_ps(shrink, _mm512_load_ps(out + i)));
    t->sum[row] = t->sum[row] * _mm512_cvtss_f32(shrink) + _mm512_reduce_add_ps(sum);
    t->largest[row] = now;
}

static void attend_block(struct tile *t, int64_t rows, int64_t token, int64_t begin, int64_t end) {
    const struct prefill_attention *job = t->job;
    int64_t n = job->head_dim;
    pair_keys(t, token, end);
    for (int64_t row = 0; row < rows; row += STRIP)
        multiply(t->scores + row * KEYS, KEYS, (const uint32_t *)(t->q + row * n), n / 2, t->pairs, KEYS, n / 2, 0);
    for (int64_t row = 0; row < t->count * job->group; row++) {
        int64_t position = t->position + row / job->group;
        weigh_row(t, row, oldest_seen(job, position) - token, position - token);
    }
    pair_values(t, token, begin, end);
    for (int64_t row = 0; row < rows; row += STRIP)
        for (int64_t i = 0; i < n; i += 64)
            multiply(t->out + row * n + i, n, (const uint32_t *)(t->scores + row * KEYS), KEYS, t->pairs + i, n, KEYS / 2, 1);
}

static void attend_queries(const void *arguments, int64_t number) {
    const struct prefill_attention *job = arguments;
    const int32_t *chosen = job->tiles + number / job->kv_heads * 2;
    int64_t n = job->head_dim, sequence = chosen[0], chunk = job->starts[sequence + 1] - job->starts[sequence];
    struct tile t;
    t.job = job;
    t.sequence = sequence;
    t.kv_head = number % job->kv_heads;
    t.first = job->starts[sequence] + chosen[1];
    t.count = smaller(job->tile_queries, chunk - chosen[1]);
    t.position = job->lengths[sequence] - chunk + chosen[1];
    int64_t rows = (t.count * job->group + STRIP - 1) / STRIP * STRIP, end = t.position + t.count;
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = job->q + (((t.first + row / job->group) * job->kv_heads + t.kv_head) * job->group + row % job->group) * n;
        int is_real = row < t.count * job->group;
        for (int64_t i = 0; i < n; i += 32)
            _mm512_store_si512(t.q + row * n + i, is_real ? _mm512_loadu_si512(from + i) : _mm512_setzero_si512());
        for (int64_t i = 0; i < n; i += 16) _mm512_store_ps(t.out + row * n + i, _mm512_setzero_ps());
        t.largest[row] = -__builtin_inff();
        t.sum[row] = 0;
    }
    int64_t begin = oldest_seen(job, t.position);
    for (int64_t token = begin / KEYS * KEYS; token < end; token += KEYS) attend_block(&t, rows, token, begin, end);
    for (int64_t row = 0; row < t.count * job->group; row++) {
        bf16 *to = job->result + (((t.first + row / job->group) * job->kv_heads + t.kv_head) * job->group + row % job->group) * n;
        __m512 sum = _mm512_set1_ps(t.sum[row]);
        for (int64_t i = 0; i < n; i += 16) store_bf16(to + i, _mm512_div_ps(_mm512_load_ps(t.out + row * n + i), sum), 0xffff);
    }
}

/* 0, or 1 + the first tile whose sequence has a length or a block outside its tables: then nothing was written. */
EXPORT int64_t halftone_prefill_attention(const struct prefill_attention *job) {
    for (int64_t i = 0; i < job->num_tiles; i++) {
        int64_t sequence = job->tiles[2 * i], length = job->lengths[sequence], blocks = (length + PAGE - 1) / PAGE;
        int64_t chunk = job->starts[sequence + 1] - job->starts[sequence];
        if (length < chunk || job->tiles[2 * i + 1] >= chunk || blocks > job->table_blocks) return i + 1;
        if (job->tiles[2 * i + 1]) continue; /* the chunk's first tile looks at the blocks */
        for (int64_t j = oldest_seen(job, length - chunk) / KEYS * (KEYS / PAGE); j < blocks; j++) {
            int32_t block = job->tables[sequence * job->table_blocks + j];
            if (block < 0 || block >= job->num_blocks) return i + 1;
        }
    }
    parallel(attend_queries, job, job->num_tiles * job->kv_heads);
    return 0;
}
