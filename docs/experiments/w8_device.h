// What w8_tile.cu asks of the machine beyond w4_device.h: products of bytes, named barriers, dependent launches, and
// what blocks tell each other through global memory.
#pragma once
#include "w4_device.h"

#ifdef __CUDACC__
#include "w8_wgmma.h"
DEVICE void launch_successor() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_predecessor() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void sync_threads_of(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void writes_visible_to_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void fence_gpu() { __threadfence(); }
DEVICE int count_arrival(int* counter) { return atomicAdd(counter, 1); }  // -> those before
DEVICE void store_global(float4* to, float4 v) { __stcg(to, v); }
DEVICE float4 load_shared_by_blocks(const float4* from) {  // not from L1, which knows nothing of other blocks
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
DEVICE void or_global(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }
DEVICE float inverse_root(float v) { return rsqrtf(v); }
DEVICE float exponential(float v) { return __expf(v); }
DEVICE float nearest(float v) { return rintf(v); }
DEVICE uint32_t shuffle_up(uint32_t v, int distance) { return __shfl_up_sync(0xffffffffu, v, distance); }
DEVICE int ones(uint32_t v) { return __popc(v); }
DEVICE int lowest(uint32_t v) { return __ffs(int(v)) - 1; }
DEVICE uint32_t half_pair(float low, float high) {
    uint32_t v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
}
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
constexpr uint64_t NORMAL = 0x1000000000000000ull;  // L2
#else
#include "w8_emulator.h"
#endif

// Rows of 32 halves (64 bytes) under the 64-byte swizzle, eight rows 512 bytes apart; beside w4_device.h's `descriptor`
// of rows of 128 bytes, which serves halves and bytes alike.
DEVICE uint64_t narrow_descriptor(uint32_t address) {
    return (uint64_t(2) << 62) | (uint64_t(32) << 32) | (uint64_t(1) << 16) | ((address & 0x3ffff) >> 4);
}
