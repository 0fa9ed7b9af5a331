// W4 linear for few rows, second version: one persistent block a multiprocessor, weights through cp.async rings.
//
// y[m, n] = sum_k w[n, k] * x[m, k]; w = nf4(code) * absmax (groups of 64) or (code - zero) * scale (groups of 128).
//
// A block owns 16 rows of the weight at a time; its WARPS warps each own a fixed slice of K, so the activations of
// that slice stay in registers where they fit. A chunk is two tiles of 16 x 64 codes, 1 KiB, laid out as the
// A fragments of mma.m16n8k16 (see nf4_stream.cu for the lane's 16 bytes of a tile). Each warp streams its chunks
// through its own ring of STAGES chunks; blocks of rows follow each other without a gap in the stream.
//
//   codes   [N/16][WARPS][CHUNKS][2 tiles][32 lanes][16 bytes]
//   scales  [N/16][WARPS][CHUNKS][8 g][4 halves]  = (tile 0: row g, row g + 8), (tile 1: row g, row g + 8)
//   zeros   the same shape, 1024 + zero (affine only)
//
// NF4 decodes a byte by a table of 256 half2 in shared memory, one copy for each lane's bank. Affine decodes by
// (word >> 4i) & 0x000f000f | 0x64006400: register i of a word holds nibbles i and i + 4.
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef AFFINE
#define AFFINE 0
#endif
#ifndef WARPS
#define WARPS 16
#endif
#ifndef CHUNKS  // of a warp's slice of K: K = WARPS * CHUNKS * 128
#define CHUNKS 2
#endif
#ifndef NT  // tiles of 8 activation rows
#define NT 1
#endif
#ifndef STAGES
#define STAGES 8
#endif
#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM 1
#endif
constexpr int K = WARPS * CHUNKS * 128;
constexpr bool RESIDENT = CHUNKS * 16 * NT <= 64;  // activations in registers
constexpr int CHUNK_BYTES = 1024 + 64 + (AFFINE ? 64 : 0);

__device__ constexpr uint16_t LEVELS[16] = {0xbc00, 0xb992, 0xb833, 0xb652, 0xb48d, 0xb1ea, 0xadd4, 0x0000,
                                            0x2d18, 0x3126, 0x33e0, 0x3568, 0x370d, 0x3880, 0x39c9, 0x3c00};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t look_up(uint32_t base, uint32_t offset) {
    uint32_t v;
    asm("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(base | offset));
    return v;
}
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// The float16 bits of one NF4 level: bytes picked from eight words of constants.
__device__ __forceinline__ uint32_t level(uint32_t code) {
    constexpr auto word = [](int first, int shift) {
        uint32_t w = 0;
        for (int j = 0; j < 4; j++) w |= uint32_t((LEVELS[first + j] >> shift) & 255) << (8 * j);
        return w;
    };
    constexpr uint32_t l0 = word(0, 0), l1 = word(4, 0), l2 = word(8, 0), l3 = word(12, 0);
    constexpr uint32_t h0 = word(0, 8), h1 = word(4, 8), h2 = word(8, 8), h3 = word(12, 8);
    const uint32_t index = code & 7;
    const uint32_t low = code & 8 ? __byte_perm(l2, l3, index) : __byte_perm(l0, l1, index);
    const uint32_t high = code & 8 ? __byte_perm(h2, h3, index) : __byte_perm(h0, h1, index);
    return (low & 255) | ((high & 255) << 8);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS_PER_SM)
w4_persistent(const char* __restrict__ codes, const char* __restrict__ scales, const char* __restrict__ zeros,
              const __half* __restrict__ x, __half* __restrict__ y, int rows, int N) {
    extern __shared__ __align__(1024) char shared[];
    // the table must lie at a multiple of 32 KiB, so that its address and a byte's offset can be joined by OR
    char* ring = shared + (AFFINE ? 0 : 65536 - (shared_address(shared) & 32767));
    char* table = AFFINE ? nullptr : ring - 32768;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    char* mine = ring + warp * STAGES * CHUNK_BYTES;
    float* sums = reinterpret_cast<float*>(ring + WARPS * STAGES * CHUNK_BYTES);  // [2][WARPS][NT][128]
    const int blocks = N / 16;
    const int my_blocks = blockIdx.x < blocks ? (blocks - blockIdx.x + gridDim.x - 1) / gridDim.x : 0;
    const int total = my_blocks * CHUNKS;

    auto fetch = [&](int step) {
        if (step < total) {
            int block = blockIdx.x + (step / CHUNKS) * gridDim.x;
            size_t chunk = (size_t(block) * WARPS + warp) * CHUNKS + step % CHUNKS;
            uint32_t to = shared_address(mine + (step % STAGES) * CHUNK_BYTES);
            copy16(to + lane * 16, codes + chunk * 1024 + lane * 16);
            copy16(to + 512 + lane * 16, codes + chunk * 1024 + 512 + lane * 16);
            if (lane < 4) copy16(to + 1024 + lane * 16, scales + chunk * 64 + lane * 16);
            if (AFFINE && lane >= 4 && lane < 8)
                copy16(to + 1088 + (lane - 4) * 16, zeros + chunk * 64 + (lane - 4) * 16);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch(i);

    if (!AFFINE) {
        // every byte's pair is decoded once and stored 32 times, 16 bytes at a time; the rotation by the thread
        // spreads a warp's stores over the banks
        for (int i = threadIdx.x; i < 512; i += WARPS * 32) {
            const int byte = i >> 1;
            const uint32_t pair = level(byte & 15) | (level(byte >> 4) << 16);
            const uint4 four = make_uint4(pair, pair, pair, pair);
#pragma unroll
            for (int j = 0; j < 4; j++)
                *reinterpret_cast<uint4*>(table + byte * 128 + (i & 1) * 64 + ((j + (i >> 1)) & 3) * 16) = four;
        }
    }
    const uint32_t base = AFFINE ? 0 : shared_address(table) + lane * 4;
    uint4 resident[RESIDENT ? CHUNKS : 1][NT][4];
    auto activations = [&](int chunk, int n, uint4* b) {
        const bool live = n * 8 + g < rows;
        const uint4* at = reinterpret_cast<const uint4*>(x + size_t(n * 8 + g) * K + (warp * CHUNKS + chunk) * 128 + 16 * t);
        const uint4 none = make_uint4(0, 0, 0, 0);
        b[0] = live ? __ldg(at) : none;
        b[1] = live ? __ldg(at + 1) : none;
        b[2] = live ? __ldg(at + 8) : none;  // 64 halves on: the second tile
        b[3] = live ? __ldg(at + 9) : none;
    };
    if (RESIDENT) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int n = 0; n < NT; n++) activations(c, n, resident[c][n]);
    }
    __syncthreads();

    int step = 0;
    for (int i = 0; i < my_blocks; i++) {
        float acc[NT][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++, step++) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            __syncwarp();
            const char* stage = mine + (step % STAGES) * CHUNK_BYTES;
            const uint4 word[2] = {*reinterpret_cast<const uint4*>(stage + lane * 16),
                                   *reinterpret_cast<const uint4*>(stage + 512 + lane * 16)};
            const uint2 scale = *reinterpret_cast<const uint2*>(stage + 1024 + g * 8);
            uint2 zero = make_uint2(0, 0);
            if (AFFINE) zero = *reinterpret_cast<const uint2*>(stage + 1088 + g * 8);
            fetch(step + STAGES - 1);  // overwrites the stage before this one, which every lane has read
            uint4 b[NT][4];
            if (!RESIDENT) {
#pragma unroll
                for (int n = 0; n < NT; n++) activations(c, n, b[n]);
            }
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const uint32_t words[4] = {word[tile].x, word[tile].y, word[tile].z, word[tile].w};
                const float2 s = __half22float2(reinterpret_cast<const __half2*>(&scale)[tile]);
                uint32_t z_low = 0, z_high = 0;
                if (AFFINE) {
                    uint32_t both = tile ? zero.y : zero.x;
                    z_low = __byte_perm(both, both, 0x1010);
                    z_high = __byte_perm(both, both, 0x3232);
                }
                uint32_t a[4][4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    if (AFFINE) {
#pragma unroll
                        for (int r = 0; r < 4; r++) {
                            uint32_t v;
                            asm("lop3.b32 %0, %1, 0x000f000f, 0x64006400, 0xea;" : "=r"(v) : "r"(words[k] >> (4 * r)));
                            a[k][r] = subtract(v, r & 1 ? z_high : z_low);
                        }
                    } else {
                        a[k][0] = look_up(base, (words[k] << 7) & 0x7f80);
                        a[k][1] = look_up(base, (words[k] >> 1) & 0x7f80);
                        a[k][2] = look_up(base, (words[k] >> 9) & 0x7f80);
                        a[k][3] = look_up(base, (words[k] >> 17) & 0x7f80);
                    }
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    const uint4* bn = RESIDENT ? resident[RESIDENT ? c : 0][n] : b[n];
                    float part[4] = {};
                    mma(part, a[0], bn[2 * tile].x, bn[2 * tile].y);
                    mma(part, a[1], bn[2 * tile].z, bn[2 * tile].w);
                    mma(part, a[2], bn[2 * tile + 1].x, bn[2 * tile + 1].y);
                    mma(part, a[3], bn[2 * tile + 1].z, bn[2 * tile + 1].w);
                    acc[n][0] += s.x * part[0];
                    acc[n][1] += s.x * part[1];
                    acc[n][2] += s.y * part[2];
                    acc[n][3] += s.y * part[3];
                }
            }
        }
        float* buffer = sums + (i & 1) * WARPS * NT * 128;
#pragma unroll
        for (int n = 0; n < NT; n++)
            *reinterpret_cast<float4*>(buffer + ((warp * NT + n) * 32 + lane) * 4) =
                make_float4(acc[n][0], acc[n][1], acc[n][2], acc[n][3]);
        __syncthreads();
        // outputs [m][16 rows of the weight], summed over the warps in order; the other buffer is free meanwhile
        const int block = blockIdx.x + i * gridDim.x;
        for (int o = threadIdx.x; o < rows * 16; o += WARPS * 32) {
            int m = o >> 4, r = o & 15, n = m >> 3, col = m & 7;
            int at = n * 128 + (((r & 7) << 2) | (col >> 1)) * 4 + (col & 1) + (r >> 3) * 2;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += buffer[w * NT * 128 + at];
            y[size_t(m) * N + block * 16 + r] = __float2half(sum);
        }
    }
}
