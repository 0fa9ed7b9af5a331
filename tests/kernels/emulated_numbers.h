// Arithmetic of the emulated machine: 16-bit and 8-bit floats, alone and in words of two or four.
#pragma once
#include "emulated_fibers.h"

inline float to_float(uint16_t bits) { _Float16 v; memcpy(&v, &bits, 2); return float(v); }
inline float power_of_2(float v) {  // what is subnormal is 0, as ex2.approx.ftz has it
    const float power = exp2f(v);
    return power < 1.17549435e-38f ? 0 : power;
}
inline float inverse_root(float v) { return 1 / sqrtf(v); }
inline float bits_to_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
inline uint32_t float_to_bits(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
inline uint16_t half_of(float v) { _Float16 h = (_Float16)v; uint16_t b; memcpy(&b, &h, 2); return b; }
inline uint16_t to_brain(float v) {  // to the nearest, ties to even
    const uint32_t b = float_to_bits(v);
    return v != v ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
#if BF16
inline float half(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
inline uint16_t bits_of(float v) { return to_brain(v); }
#else
inline float half(uint16_t bits) { return to_float(bits); }
inline uint16_t bits_of(float v) { return half_of(v); }
#endif
template <class F>
inline uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, F f) {
    return bits_of(f(half(a), half(b), half(c))) | uint32_t(bits_of(f(half(a >> 16), half(b >> 16), half(c >> 16)))) << 16;
}
inline uint32_t subtract(uint32_t a, uint32_t b) { return each_half(a, b, 0, [](float x, float y, float) { return x - y; }); }
inline uint32_t multiply(uint32_t a, uint32_t b) { return each_half(a, b, 0, [](float x, float y, float) { return x * y; }); }
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return each_half(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) { return (a & mask) | (b & ~mask); }
inline uint32_t to_pair(float low, float high) { return bits_of(low) | uint32_t(bits_of(high)) << 16; }
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
inline float reciprocal(float v) { return 1 / v; }
inline float quick_reciprocal(float v) { return 1 / v; }
inline uint32_t to_halves(float low, float high) { return half_of(low) | uint32_t(half_of(high)) << 16; }
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return to_halves(to_float(a) - to_float(b), to_float(a >> 16) - to_float(b >> 16));
}
inline float e4m3(uint8_t v) {
    const int exponent = v >> 3 & 15, mantissa = v & 7;
    const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
    return (v & 7) == 7 && exponent == 15 ? NAN : v & 128 ? -size : size;
}
inline uint16_t to_e4m3(float low, float high) {
    uint16_t both = 0;
    for (int i = 0; i < 2; i++) {
        const float v = i ? high : low, size = fabsf(v);
        int best = 0;  // of all codes the nearest, of two the even one
        for (int code = 1; code < 127; code++) {
            const float nearer = fabsf(e4m3(code) - size) - fabsf(e4m3(best) - size);
            if (nearer < 0 || (nearer == 0 && code % 2 == 0)) best = code;
        }
        both |= (v != v ? 127 : best | (std::signbit(v) ? 128 : 0)) << 8 * i;
    }
    return both;
}
inline void e4m3_to_halves(uint32_t& low, uint32_t& high, uint32_t codes) {
    low = to_halves(e4m3(codes), e4m3(codes >> 8)), high = to_halves(e4m3(codes >> 16), e4m3(codes >> 24));
}
template <int TABLE>
inline uint32_t look_up_at(uint32_t offset) { uint32_t v; memcpy(&v, me->block->memory + TABLE + offset, 4); return v; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline float load_number(const uint16_t* p) { return half(*p); }
