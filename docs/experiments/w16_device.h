// What w16_stream.cu asks of the machine beyond w4_device.h: products of two operands in shared memory, pairs of blocks.
#pragma once
#include "w4_device.h"

#ifdef __CUDACC__
#include "w16_wgmma.h"
DEVICE void prefetch_box(const TensorMap* map, int column, int row) {  // into the L2
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}
DEVICE void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
DEVICE void arrive_in_pair(uint32_t barrier, int rank) { barrier_arrive_at(barrier, rank); }
DEVICE void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t policy) {
    copy_box_to_many(to, map, column, row, barrier, 3, policy);
}
// A number in a workspace, between blocks: there or ABSENT. Words are written and read whole, each for itself.
constexpr uint32_t ABSENT = 0xffffffff;
DEVICE float present(float v) { return v == v ? v : __uint_as_float(0x7fffffff); }
DEVICE void part_give(float* to, float4 v) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(present(v.x)), "f"(present(v.y)),
                 "f"(present(v.z)), "f"(present(v.w))
                 : "memory");
}
DEVICE float4 part_look(const float* from) {
    float4 v;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
DEVICE bool is_there(float4 v) {
    return __float_as_uint(v.x) != ABSENT && __float_as_uint(v.y) != ABSENT && __float_as_uint(v.z) != ABSENT &&
           __float_as_uint(v.w) != ABSENT;
}
DEVICE void part_take(float* from) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(from), "r"(ABSENT) : "memory");
}
DEVICE bool look_again(int& tries) {  // ends the kernel where it would look for ever
    if (++tries > 20000000) stop();
    return true;
}
DEVICE float bias_at(const uint16_t* bias) {
    const uint16_t bits = __ldg(bias);
    return BF16 ? bits_to_float(uint32_t(bits) << 16) : to_float(bits);
}
#else
// Each word arrives later by some looks of whoever looks, a later one perhaps before an earlier one.
inline std::multimap<uint64_t, std::function<void()>> words_on_their_way;
inline uint64_t looks = 0;
inline uint32_t lateness = 1;
inline void word_store(float* to, uint32_t bits) {
    demand_awaited();
    lateness = lateness * 1664525 + 1013904223;
    words_on_their_way.insert({looks + (lateness >> 20), [=] { memcpy(to, &bits, 4); }});
}
inline void words_arrive(uint64_t until) {
    auto& words = words_on_their_way;
    for (; !words.empty() && words.begin()->first <= until; words.erase(words.begin())) words.begin()->second();
}
inline void launch_over() { words_arrive(~uint64_t(0)); }
constexpr uint32_t ABSENT = 0xffffffff;
inline uint32_t bits_of_float(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
inline void part_give(float* to, float4 v) {
    const float numbers[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) word_store(to + i, numbers[i] == numbers[i] ? bits_of_float(numbers[i]) : 0x7fffffff);
}
inline float4 part_look(const float* from) {
    demand_awaited(), words_arrive(++looks);
    return {from[0], from[1], from[2], from[3]};
}
inline bool is_there(float4 v) {
    for (float number : {v.x, v.y, v.z, v.w})
        if (bits_of_float(number) == ABSENT) return false;
    return true;
}
inline void part_take(float* from) {
    for (int i = 0; i < 4; i++) word_store(from + i, ABSENT);
}
inline bool look_again(int&) { yield(); return true; }
inline void prefetch_box(const TensorMap*, int, int) {}
inline void prefetch_map(const TensorMap*) {}
struct float2 { float x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float bias_at(const uint16_t* bias) { return half(*bias); }
// All blocks of a launch are one cluster of the emulator's; a pair are neighbours in it.
inline int first_of_pair() { return me->block->rank / 2 * 2; }
inline void arrive_in_pair(uint32_t barrier, int rank) { barrier_arrive_at(barrier, first_of_pair() + rank); }
inline void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t) {
    copy_box_to_many(to, map, column, row, barrier, 3 << first_of_pair(), 0);
}
inline void read_operand(uint64_t descriptor, int rows, float (*to)[16]) {
    if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 64) { printf("descriptor?\n"); abort(); }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 16; k++) {
            uint32_t at = ((descriptor & 0x3fff) << 4) + r * 128 + 2 * k;
            at ^= (at >> 7 & 7) << 4;
            uint16_t bits;
            memcpy(&bits, me->block->memory + at, 2);  // a descriptor means the block it is in
            to[r][k] = half(bits);
        }
}
inline void multiply_shared(void** all) {  // of the 128 threads of a warpgroup
    static float w[64][16], x[256][16];
    const Wgmma& first = *(Wgmma*)all[0];
    read_operand(first.a_at, 64, w), read_operand(first.b, first.n, x);
    for (int l = 0; l < 128; l++) {
        const Wgmma& one = *(Wgmma*)all[l];
        if (one.a_at != first.a_at || one.b != first.b || one.add != first.add) { printf("not one wgmma\n"); abort(); }
        for (int i = 0; i < first.n / 2; i++) {
            const float* row = w[l / 32 * 16 + l % 32 / 4 + 8 * (i >> 1 & 1)];
            const float* column = x[i / 4 * 8 + 2 * (l & 3) + (i & 1)];
            float sum = one.add ? one.d[i] : 0;
            for (int k = 0; k < 16; k++) sum += row[k] * column[k];
            one.d[i] = sum;
        }
    }
}
template <int N>
inline void wgmma_shared(float* d, uint64_t a, uint64_t b, int add) {
    me->wgmmas.open.push_back({d, nullptr, b, add, N, a, multiply_shared});
}
#endif

DEVICE void cluster_sync() { cluster_arrive(), cluster_wait(); }
