// The rest of the machine on a CPU, beside machine_emulator.h: products of bytes, barriers of some of a block's threads.
#pragma once
#include <cmath>

inline void sync_threads_of(int barrier, int threads) {
    meet(me->block->named[barrier], 0, threads, nullptr, [](void**) {});
}
inline void writes_visible_to_wgmma() {}
inline int count_arrival(int* counter) { return (*counter)++; }
inline uint32_t load_fresh2(const uint16_t* from) { demand_awaited(); return *from; }
inline void store_for_others(uint16_t* to, uint32_t v) { demand_awaited(), me->stores.push_back([=] { *to = uint16_t(v); }); }
inline uint32_t shuffle_up(uint32_t v, int distance) {
    uint32_t result = 0;
    struct Slot { uint32_t in, *out; } slot{v, &result};
    meet_warp(&slot, [distance](void** all) {
        for (int l = 0; l < 32; l++) *((Slot*)all[l])->out = ((Slot*)all[l < distance ? l : l - distance])->in;
    });
    return result;
}
inline int ones(uint32_t v) { return __builtin_popcount(v); }
inline int lowest(uint32_t v) { return __builtin_ctz(v); }
template <int N>
inline void settle(void*) {}

inline const char* swizzled_byte(uint64_t descriptor, int row, int byte) {
    uint32_t at = ((descriptor & 0x3fff) << 4) + row / 8 * 1024 + row % 8 * 128 + byte;
    return me->block->memory + (at ^ ((at >> 7 & 7) << 4));
}
template <class Sum, class Value>
inline void multiply_bytes(void** all, Value value) {
    const Wgmma& first = *(Wgmma*)all[0];
    for (int l = 0; l < 128; l++) {
        const Wgmma& w = *(Wgmma*)all[l];
        if (w.a_at != first.a_at || w.b != first.b) { printf("a warpgroup's descriptors differ\n"); abort(); }
        Sum* d = (Sum*)w.d;
        for (int i = 0; i < w.n / 2; i++) {
            const int row = l / 32 * 16 + l % 32 / 4 + 8 * (i >> 1 & 1), column = i / 4 * 8 + 2 * (l & 3) + (i & 1);
            Sum sum = w.add ? d[i] : 0;
            for (int k = 0; k < 32; k++)
                sum += Sum(value(*swizzled_byte(w.a_at, row, k))) * Sum(value(*swizzled_byte(w.b, column, k)));
            d[i] = sum;
        }
    }
}
template <int N>
inline void wgmma_codes(int* d, uint64_t a, uint64_t b, int add) {
    me->wgmmas.open.push_back({(float*)d, nullptr, b, add, N, a, [](void** all) {
        multiply_bytes<int>(all, [](char v) { return int((signed char)v); });
    }});
}
template <int N>
inline void wgmma_fp8(float* d, uint64_t a, uint64_t b, int add) {
    me->wgmmas.open.push_back({d, nullptr, b, add, N, a, [](void** all) {
        multiply_bytes<float>(all, [](char v) { return e4m3(uint8_t(v)); });
    }});
}
