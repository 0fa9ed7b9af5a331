// Reads n bytes, a multiple of 64, 16 at a time and several in flight; writes nothing unless it meets an odd sum. What
// no kernel that needs those bytes can be faster than.
#include <stdint.h>

extern "C" __global__ void __launch_bounds__(512) read_only(const uint4* __restrict__ from, uint32_t* to, uint64_t n) {
    uint32_t sum = 0;
    const uint64_t pieces = n / 16, stride = uint64_t(gridDim.x) * 512;
    uint64_t i = uint64_t(blockIdx.x) * 512 + threadIdx.x;
    for (; i + 3 * stride < pieces; i += 4 * stride) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) v[j] = __ldcs(from + i + j * stride);
#pragma unroll
        for (int j = 0; j < 4; j++) sum += v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (; i < pieces; i += stride) {
        const uint4 v = __ldcs(from + i);
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    if (sum == 0x12345677) *to = sum;
}
