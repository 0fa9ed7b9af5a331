// A row of q, k or v, held in pieces by LANES neighbouring threads: norm, rotary embedding, codes. Rounded where
// kernels/rotary_kv rounds and, at 128 dimensions, added up in its order: what is written are the same bits.
#pragma once
#include "layout.h"

// kernels/kv_codes; WHOLE: a number that float32 holds without halves, so adding it rounds
constexpr float STEP = CODES == 1 ? 1.0f / 127 : 1.0f / 448, LEAST_SCALE = 1.0f / (1ull << 60), WHOLE = 12582912.0f;

struct Angles {
    float left_cos[8], right_cos[8], left_sin[8], right_sin[8];
};

DEVICE float number(uint32_t pair, int i) {  // of the activations' type
    return BF16 ? bits_to_float(i ? pair & 0xffff0000 : pair << 16) : to_float(uint16_t(pair >> 16 * i));
}
DEVICE void unpack(float* to, uint4 v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] = number(words[i >> 1], i & 1);
}
DEVICE uint4 pack(const float* v) {
    return make_uint4(to_pair(v[0], v[1]), to_pair(v[2], v[3]), to_pair(v[4], v[5]), to_pair(v[6], v[7]));
}
DEVICE uint4 pack_halves(const float* v) {
    return make_uint4(to_halves(v[0], v[1]), to_halves(v[2], v[3]), to_halves(v[4], v[5]), to_halves(v[6], v[7]));
}
DEVICE void load_floats(float* to, const float* from) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 v = load_global16(from + 4 * i);
        to[4 * i] = bits_to_float(v.x), to[4 * i + 1] = bits_to_float(v.y);
        to[4 * i + 2] = bits_to_float(v.z), to[4 * i + 3] = bits_to_float(v.w);
    }
}

// Of a row that is normed by `weights`, else null; all its threads come here.
DEVICE void norm(uint4& left, uint4& right, const char* weights, float eps) {
    float a[8], b[8];
    unpack(a, left), unpack(b, right);
    float left_sum = a[1] * a[1], right_sum = b[1] * b[1];
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i != 1) left_sum = fused(a[i], a[i], left_sum), right_sum = fused(b[i], b[i], right_sum);
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask /= 2)
        left_sum += shuffle_xor(left_sum, mask), right_sum += shuffle_xor(right_sum, mask);
    if (weights == nullptr) return;
    const float factor = inverse_root((left_sum + right_sum) * (1.0f / DIM) + eps);
    float by[8];
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] *= factor, b[i] *= factor;
    unpack(a, pack(a)), unpack(b, pack(b));  // rounded before it is scaled, and behind
    unpack(by, load_global16(weights));
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] *= by[i];
    unpack(by, load_global16(weights + DIM));
#pragma unroll
    for (int i = 0; i < 8; i++) b[i] *= by[i];
    left = pack(a), right = pack(b);
}

DEVICE void rotate(uint4& left, uint4& right, const Angles& by) {
    float a[8], b[8], c[8], d[8];
    unpack(a, left), unpack(b, right);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        c[i] = fused(a[i], by.left_cos[i], b[i] * by.left_sin[i]);
        d[i] = fused(b[i], by.right_cos[i], a[i] * by.right_sin[i]);
    }
    left = pack(c), right = pack(d);
}

// The bits of a row's largest number without its sign, NaN above all; all its threads come here.
DEVICE uint32_t largest_of(uint4 left, uint4 right) {
    float a[8], b[8];
    unpack(a, left), unpack(b, right);
    uint32_t largest = 0;
    auto take = [&](float v) {
        const uint32_t bits = float_to_bits(v) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    };
#pragma unroll
    for (int i = 0; i < 8; i++) take(a[i]), take(b[i]);
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) take(shuffle_xor(bits_to_float(largest), mask));
    return largest;
}

// bfloat16 -> float16, divided by a power of two near the row's largest, 2^-100 to 2^100. -> it.
DEVICE float divide(uint4& left, uint4& right, uint32_t largest) {
    const uint32_t found = largest >> 23, exponent = found < 27 ? 27 : found > 227 ? 227 : found;
    const float factor = bits_to_float((254 - exponent) << 23);
    float a[8], b[8];
    unpack(a, left), unpack(b, right);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] *= factor, b[i] *= factor;
    left = pack_halves(a), right = pack_halves(b);
    return bits_to_float(exponent << 23);
}

DEVICE uint32_t four_codes(const float* v, float inverse) {
    const bool is_whole = inverse > 0;  // else the scale is broken and tells
    if (CODES == 1) {  // what is rounded to an integer lies in a sum's lowest byte; not rounded before, as in rotary_kv
        uint32_t sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = float_to_bits(is_whole ? fused(inverse, v[i], WHOLE) : WHOLE);
        return permute(permute(sums[0], sums[1], 0x0040), permute(sums[2], sums[3], 0x0040), 0x5410);
    }
    float scaled[4];
#pragma unroll
    for (int i = 0; i < 4; i++) scaled[i] = is_whole ? v[i] * inverse : 0;
    return to_e4m3(scaled[0], scaled[1]) | uint32_t(to_e4m3(scaled[2], scaled[3])) << 16;
}
// A row of k or v -> its codes and bfloat16 scale.
DEVICE uint16_t quantize(uint2& left_codes, uint2& right_codes, uint4 left, uint4 right, uint32_t largest) {
    uint16_t scale = to_brain(bits_to_float(largest) * STEP);
    if (bits_to_float(uint32_t(scale) << 16) < LEAST_SCALE) scale = to_brain(LEAST_SCALE);
    const float inverse = reciprocal(bits_to_float(uint32_t(scale) << 16));
    float a[8], b[8];
    unpack(a, left), unpack(b, right);
    left_codes = {four_codes(a, inverse), four_codes(a + 4, inverse)};
    right_codes = {four_codes(b, inverse), four_codes(b + 4, inverse)};
    return scale;
}
