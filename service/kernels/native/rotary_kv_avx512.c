/* Norms of q and k, rotary embedding, K and V into their pages, with the roundings of
   kernels/rotary_kv/reference.py. */

#include "vectors_avx512.h"

enum { TILE_TOKENS = 8, MAX_HEAD_DIM = 256 };

struct rotary_kv {
    const bf16 *qkv;         /* [tokens, (heads + 2 kv_heads) * head_dim] */
    const float *cos, *sin;  /* [positions, head_dim], the first half of sin negated; null: no rotation */
    const int64_t *positions, *slots; /* [tokens] */
    const bf16 *q_norm, *k_norm;      /* [head_dim] or null */
    bf16 *q;                          /* [tokens, heads, head_dim] */
    bf16 *keys, *values;              /* [blocks, kv_heads, block_tokens, head_dim] */
    int64_t tokens, heads, kv_heads, head_dim, block_tokens, num_blocks, num_positions;
    double eps;
};

/* One head, possibly normed, possibly rotated; head_dim is a multiple of 32. */
static void head(const struct rotary_kv *job, const bf16 *from, const bf16 *norm, int64_t position, bf16 *to) {
    const __mmask16 all = 0xffff;
    int64_t n = job->head_dim, half = n / 2;
    float x[MAX_HEAD_DIM];
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
        __m512 part = load_bf16(from + i, all);
        squares = _mm512_fmadd_ps(part, part, squares);
        _mm512_storeu_ps(x + i, part);
    }
    if (norm) {
        __m512 factor = rms_factor(squares, n, (float)job->eps);
        for (int64_t i = 0; i < n; i += 16) {
            __m512 part = through_bf16(_mm512_mul_ps(_mm512_loadu_ps(x + i), factor));
            _mm512_storeu_ps(x + i, through_bf16(_mm512_mul_ps(part, load_bf16(norm + i, all))));
        }
    }
    if (!job->cos) {
        for (int64_t i = 0; i < n; i += 16) store_bf16(to + i, _mm512_loadu_ps(x + i), all);
        return;
    }
    const float *cos = job->cos + position * n, *sin = job->sin + position * n;
    for (int64_t i = 0; i < n; i += 16) {
        __m512 other = _mm512_loadu_ps(x + (i < half ? i + half : i - half));
        __m512 turned = _mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_loadu_ps(cos + i));
        store_bf16(to + i, _mm512_fmadd_ps(other, _mm512_loadu_ps(sin + i), turned), all);
    }
}

static void rotate_tokens(const void *arguments, int64_t tile) {
    const struct rotary_kv *job = arguments;
    int64_t n = job->head_dim, end = smaller(job->tokens, (tile + 1) * TILE_TOKENS);
    for (int64_t token = tile * TILE_TOKENS; token < end; token++) {
        const bf16 *from = job->qkv + token * (job->heads + 2 * job->kv_heads) * n;
        int64_t position = job->cos ? job->positions[token] : 0;
        for (int64_t i = 0; i < job->heads; i++, from += n)
            head(job, from, job->q_norm, position, job->q + (token * job->heads + i) * n);
        int64_t block = job->slots[token] / job->block_tokens, offset = job->slots[token] % job->block_tokens;
        for (int64_t i = 0; i < job->kv_heads; i++, from += n) {
            int64_t place = ((block * job->kv_heads + i) * job->block_tokens + offset) * n;
            head(job, from, job->k_norm, position, job->keys + place);
            const bf16 *value = from + job->kv_heads * n;
            for (int64_t j = 0; j < n; j += 32)
                _mm512_storeu_si512(job->values + place + j, _mm512_loadu_si512(value + j));
        }
    }
}

/* 0, or 1 + the first token whose position or slot lies outside the tables: then nothing was written. */
EXPORT int64_t halftone_rotary_kv(const struct rotary_kv *job) {
    uint64_t num_slots = (uint64_t)(job->num_blocks * job->block_tokens);
    for (int64_t token = 0; token < job->tokens; token++) {
        if ((uint64_t)job->slots[token] >= num_slots) return token + 1;
        if (job->cos && (uint64_t)job->positions[token] >= (uint64_t)job->num_positions) return token + 1;
    }
    parallel(rotate_tokens, job, (job->tokens + TILE_TOKENS - 1) / TILE_TOKENS);
    return 0;
}
