// NF4 linear for few rows: y[m, n] = sum_k nf4(code[n, k]) * absmax[n, k / 64] * x[m, k], weights read once.
//
// A warp owns 16 rows of the weight and walks along K in tiles of 64. One tile is 512 contiguous bytes: lane l
// holds 16 bytes = 4 words, word s is its A fragment of mma.m16n8k16 number s, two codes a byte:
//
//   byte 0: row g,     k = 16t + 4s + 0, 1        g = l / 4, t = l % 4
//   byte 1: row g + 8, k = 16t + 4s + 0, 1        (low nibble: even k)
//   byte 2: row g,     k = 16t + 4s + 2, 3
//   byte 3: row g + 8, k = 16t + 4s + 2, 3
//
// K is permuted inside the tile so that a lane's activations are 16 neighbours: two 16-byte loads a tile.
// absmax is applied to the 64-deep partial sum in float32. The warps of a block split K and are added in order.
//
// DECODE 0: prmt on the two bytes of the sixteen float16 levels. DECODE 1: a table of 256 half2, one copy a lane.
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef DECODE
#define DECODE 0
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef NT  // tiles of 8 activations rows
#define NT 1
#endif
#ifndef RT  // tiles of 16 weight rows that share one read of the activations
#define RT 1
#endif
#ifndef UNROLL
#define UNROLL 4
#endif

__device__ constexpr uint16_t LEVELS[16] = {0xbc00, 0xb992, 0xb833, 0xb652, 0xb48d, 0xb1ea, 0xadd4, 0x0000,
                                    0x2d18, 0x3126, 0x33e0, 0x3568, 0x370d, 0x3880, 0x39c9, 0x3c00};

__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t s) {
    uint32_t d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(s));
    return d;
}

struct Tables { uint32_t lo[4], hi[4]; };

// Four codes (the low 16 bits of `four`) -> two half2 registers.
__device__ __forceinline__ void decode_prmt(uint32_t four, const Tables& t, uint32_t& first, uint32_t& second) {
    uint32_t index = four & 0x7777u;
    uint32_t upper = prmt(0x0000ff00u, 0u, (four >> 3) & 0x1111u);
    uint32_t lo = (prmt(t.lo[0], t.lo[1], index) & ~upper) | (prmt(t.lo[2], t.lo[3], index) & upper);
    uint32_t hi = (prmt(t.hi[0], t.hi[1], index) & ~upper) | (prmt(t.hi[2], t.hi[3], index) & upper);
    first = prmt(lo, hi, 0x5140u);
    second = prmt(lo, hi, 0x7362u);
}

__device__ __forceinline__ void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// codes: [N/16][K/64][32 lanes][4 words]; absmax: half [N/16][K/64][16 rows]; x: half [rows][K]; y: half [rows][N]
extern "C" __global__ void __launch_bounds__(WARPS * 32)
nf4_stream(const uint4* __restrict__ codes, const __half* __restrict__ absmax, const __half* __restrict__ x,
           __half* __restrict__ y, int rows, int N, int K) {
    extern __shared__ char shared[];
    float* sums = reinterpret_cast<float*>(shared);  // [WARPS][RT][NT][32][4]
    constexpr int unrolled = UNROLL;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    Tables tables;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        tables.lo[i] = tables.hi[i] = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            tables.lo[i] |= uint32_t(LEVELS[4 * i + j] & 255) << (8 * j);
            tables.hi[i] |= uint32_t(LEVELS[4 * i + j] >> 8) << (8 * j);
        }
    }
#if DECODE == 1
    uint32_t* table = reinterpret_cast<uint32_t*>(sums + WARPS * RT * NT * 128);  // [256][32]
    for (int i = threadIdx.x; i < 256 * 32; i += WARPS * 32) {
        uint32_t first, second;
        decode_prmt(i >> 5, tables, first, second);
        table[i] = first;
    }
    __syncthreads();
#endif
    const int tiles = K / 64, share = tiles / WARPS;
    for (int block = blockIdx.x; block < N / (16 * RT); block += gridDim.x) {
        float total[RT][NT][4] = {};
        const size_t first_tile = size_t(block) * RT * tiles + warp * share;
        const uint4* at = codes + first_tile * 32 + lane;
        const __half* scale_at = absmax + first_tile * 16 + g;
        const __half* x_at = x + size_t(g) * K + warp * share * 64 + 16 * t;
#pragma unroll unrolled
        for (int tile = 0; tile < share; tile++) {
            uint4 word[RT];
            float low[RT], high[RT];
#pragma unroll
            for (int r = 0; r < RT; r++) {
                word[r] = __ldcs(at + size_t(r * tiles + tile) * 32);
                low[r] = __half2float(scale_at[size_t(r * tiles + tile) * 16]);
                high[r] = __half2float(scale_at[size_t(r * tiles + tile) * 16 + 8]);
            }
            uint4 b[NT][2];
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint4* xv = reinterpret_cast<const uint4*>(x_at + size_t(n) * 8 * K + tile * 64);
                bool live = n * 8 + g < rows;
                b[n][0] = live ? __ldg(xv) : make_uint4(0, 0, 0, 0);
                b[n][1] = live ? __ldg(xv + 1) : make_uint4(0, 0, 0, 0);
            }
#pragma unroll
            for (int r = 0; r < RT; r++) {
                const uint32_t words[4] = {word[r].x, word[r].y, word[r].z, word[r].w};
                uint32_t a[4][4];
#pragma unroll
                for (int s = 0; s < 4; s++) {
#if DECODE == 1
                    a[s][0] = table[(words[s] & 255) * 32 + lane];
                    a[s][1] = table[((words[s] >> 8) & 255) * 32 + lane];
                    a[s][2] = table[((words[s] >> 16) & 255) * 32 + lane];
                    a[s][3] = table[(words[s] >> 24) * 32 + lane];
#else
                    decode_prmt(words[s], tables, a[s][0], a[s][1]);
                    decode_prmt(words[s] >> 16, tables, a[s][2], a[s][3]);
#endif
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
                    float part[4] = {};
                    mma(part, a[0], b[n][0].x, b[n][0].y);
                    mma(part, a[1], b[n][0].z, b[n][0].w);
                    mma(part, a[2], b[n][1].x, b[n][1].y);
                    mma(part, a[3], b[n][1].z, b[n][1].w);
                    total[r][n][0] += low[r] * part[0];
                    total[r][n][1] += low[r] * part[1];
                    total[r][n][2] += high[r] * part[2];
                    total[r][n][3] += high[r] * part[3];
                }
            }
        }
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int n = 0; n < NT; n++)
                *reinterpret_cast<float4*>(sums + (((warp * RT + r) * NT + n) * 32 + lane) * 4) =
                    make_float4(total[r][n][0], total[r][n][1], total[r][n][2], total[r][n][3]);
        __syncthreads();
        for (int i = threadIdx.x; i < RT * NT * 128; i += WARPS * 32) {
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += sums[w * RT * NT * 128 + i];
            int r = i / (NT * 128), n = (i / 128) % NT, l = (i / 4) & 31, c = i & 3;
            int row = n * 8 + (l & 3) * 2 + (c & 1), column = (block * RT + r) * 16 + (l >> 2) + (c >> 1) * 8;
            if (row < rows) y[size_t(row) * N + column] = __float2half(sum);
        }
        __syncthreads();
    }
}
