// Weights of w4_layout.py as float16 [outputs][K], for a product by cuBLAS; and a kernel that only reads: the floor.
//
// A warp decodes a tile of 16 outputs x 64 K (16 bytes a lane), turns it in 2 KiB of shared memory and writes rows of
// 128 bytes. Grid-stride over the tiles of `blocks` blocks of 16 outputs from block `first`.
#include "w4_device.h"

#ifndef AFFINE
#define AFFINE 0
#endif
constexpr int WARPS = 16, THREADS = WARPS * 32;
constexpr int MAP = 1024, STAGING = 2048, TABLE = 65536;  // addresses in shared memory
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == (AFFINE ? STAGING + WARPS * 2048 : TABLE + 32768) - 1024);  // what the host asks for
#endif

KERNEL __launch_bounds__(THREADS, 2)
w4_whole(const char* __restrict__ codes, const char* __restrict__ scales, const char* __restrict__ zeros,
         const float* __restrict__ nested, const float* __restrict__ map, char* __restrict__ w, int first, int blocks,
         int N, int K, GRID_CONSTANT Parts parts) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2;
    const int all_tiles = K / 64, all_blocks = N / 16;
    if (!AFFINE) {
        fill_table(window + TABLE, thread, THREADS);
        for (int i = thread; i < 256; i += THREADS) reinterpret_cast<float*>(window + MAP)[i] = load_global(map + i);
        sync_block();
    }
    const float* levels = reinterpret_cast<const float*>(window + MAP);
    const uint32_t staging = STAGING + warp * 2048;
    for (int i = blockIdx.x * WARPS + warp; i < blocks * all_tiles; i += gridDim.x * WARPS) {
        const int block = first + i / all_tiles, tile = i % all_tiles;
        const uint4 word = load_global16(codes + (size_t(block) * all_tiles + tile) * 512 + lane * 16);
        uint32_t low, high, low_zero = 0, high_zero = 0;
        if (AFFINE) {
            const size_t at = size_t(tile / 2) * all_blocks + block;
            const uint32_t both = *reinterpret_cast<const uint32_t*>(scales + at * 32 + g * 4);
            const uint32_t packed = *reinterpret_cast<const uint8_t*>(zeros + at * 8 + g);
            low = (both & 0xffff) * 0x10001u, high = (both >> 16) * 0x10001u;
            low_zero = low_zero_of(packed), high_zero = high_zero_of(packed);
        } else {
            const uint32_t both =
                *reinterpret_cast<const uint16_t*>(scales + (size_t(tile) * all_blocks + block) * 16 + g * 2);
            const int at = first_absmax(parts, block, all_tiles) + g * all_tiles + tile;
            const float offset = part_of(parts, block).offset;
            const float a = levels[both & 255] * load_global(nested + (at >> 8)) + offset;
            const float b = levels[both >> 8] * load_global(nested + ((at + 8 * all_tiles) >> 8)) + offset;
            low = to_halves(a, a), high = to_halves(b, b);
        }
        const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
        for (int s = 0; s < 4; s++) {
            uint32_t a[4];
            if (AFFINE) decode_affine(words[s], low_zero, high_zero, a);
            else decode_nf4(words[s], here + TABLE + lane * 4, a);
            a[0] = multiply(a[0], low), a[1] = multiply(a[1], high);
            a[2] = multiply(a[2], low), a[3] = multiply(a[3], high);
            // matrices 0 to 3: rows 0..7, rows 8..15, then both 8 of K on
            const int row = lane & 15, piece = 2 * s + (lane >> 4);
            store_matrices(here + staging + row * 128 + ((piece ^ row) & 7) * 16, a);
        }
        sync_warp();
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = 4 * j + (lane >> 3);
            const uint4 v = *reinterpret_cast<const uint4*>(window + staging + row * 128 + ((lane ^ row) & 7) * 16);
            *reinterpret_cast<uint4*>(w + (size_t(i / all_tiles * 16 + row) * K + tile * 64) * 2 + (lane & 7) * 16) = v;
        }
        sync_warp();
    }
}

#ifdef __CUDACC__
// Reads n bytes, a multiple of 64, 16 at a time and several in flight; writes nothing unless it meets an odd sum.
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
#endif
