// What w8_tile.cu asks of the machine beyond machine.h: products of bytes, named barriers, counters.
#pragma once
#include "machine.h"

#ifdef __CUDACC__
#include "wgmma_registers.h"
#include "w8_wgmma.h"
DEVICE void sync_threads_of(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void writes_visible_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE int count_arrival(int* counter) { return atomicAdd(counter, 1); }  // -> those before
DEVICE uint32_t load_fresh2(const uint16_t* from) {  // of what a predecessor wrote; never put off to where it is used
    uint16_t v;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(from));
    return v;
}
DEVICE void store_for_others(uint16_t* to, uint32_t v) { *to = uint16_t(v); }  // seen after fence_device
DEVICE uint32_t shuffle_up(uint32_t v, int distance) { return __shfl_up_sync(0xffffffffu, v, distance); }
DEVICE int ones(uint32_t v) { return __popc(v); }
DEVICE int lowest(uint32_t v) { return __ffs(int(v)) - 1; }
template <int N>
DEVICE void settle(float* sums) {  // what reads them stays behind the wait before this
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}
template <int N>
DEVICE void settle(int* sums) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(sums[i])::"memory");
}
#else
#include "w8_emulator.h"
#endif

DEVICE float float_of(uint32_t bits) {  // of the activations' type
#if BF16
    return bits_to_float(bits << 16);
#else
    return to_float(uint16_t(bits));
#endif
}
// Rows of 32 halves (64 bytes) under the 64-byte swizzle, eight rows 512 bytes apart; beside machine.h's `descriptor` of
// rows of 128 bytes, which serves halves and bytes alike.
DEVICE uint64_t narrow_descriptor(uint32_t address) {
    return (uint64_t(2) << 62) | (uint64_t(32) << 32) | (uint64_t(1) << 16) | ((address & 0x3ffff) >> 4);
}
