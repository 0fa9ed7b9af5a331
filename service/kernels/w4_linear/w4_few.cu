// W4 linear for up to 32 rows: weights stream once, activations stay in registers. Third version of w4_persistent.cu.
//
// y[m, n] = sum_k w[n, k] x[m, k]; w = nf4(code) * absmax (groups of 64) or (code - zero) * scale (groups of 128),
// zeros 4-bit, absmax 8-bit codes under nested absmax and an offset a part; layout: w4_layout.py.
//
//   cluster of CLUSTER blocks: K in as many shares, so that a block's activations are few
//     block: RBLOCKS blocks of 16 outputs at a time x KWARPS slices of its share; one warp each
//       warp: CHUNKS chunks of 128 input features, whose activations it keeps in registers as B fragments;
//             chunks arrive through its own cp.async ring, across blocks of outputs without a gap
//
// Sums: a warp's partial [8 NT rows][16 outputs] to shared memory, added over the slices in a fixed order; under
// a cluster each line of 16 outputs then goes to its owner's shared memory and is added there over the shares, one
// round later, so that nobody waits for the others. No atomics: bits do not depend on the run.
#include "w4_device.h"

#ifndef AFFINE
#define AFFINE 0
#endif
#ifndef CLUSTER
#define CLUSTER 1
#endif
#ifndef KWARPS
#define KWARPS 16
#endif
#ifndef RBLOCKS
#define RBLOCKS 1
#endif
#ifndef CHUNKS
#define CHUNKS 2
#endif
#ifndef NT  // tiles of 8 rows of activations
#define NT 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif
constexpr int WARPS = KWARPS * RBLOCKS, THREADS = WARPS * 32, K = CLUSTER * KWARPS * CHUNKS * 128, TILES = K / 64;
// chunk of the ring: codes 1024, then scales 32 and zeros 8, or absmax 2 x 16 and nested absmax 16 x 4
constexpr int CHUNK_BYTES = AFFINE ? 1088 : 1136;
constexpr int PARTIAL = 8 * NT * 20 + 16;  // floats of a warp: rows 20 apart, warps 16 banks apart
constexpr int LINES = RBLOCKS * 8 * NT, OWNED = (LINES + CLUSTER - 1) / CLUSTER;
constexpr int RECEIVED = 2 * CLUSTER * OWNED * 16 * 4;
constexpr int RING_BYTES = (WARPS * STAGES * CHUNK_BYTES + 127) / 128 * 128;
constexpr int PARTIAL_BYTES = 2 * WARPS * PARTIAL * 4, STAGING_BYTES = WARPS * NT * 1024;
constexpr int SUM_BYTES = PARTIAL_BYTES > STAGING_BYTES ? PARTIAL_BYTES : STAGING_BYTES;
// Addresses in shared memory; the first 1024 bytes are the system's. NF4's table has the second 64 KiB; before it lies
// the ring where it fits, else the sums, and the other behind it.
constexpr int RECEIVE = 1024, FREE = RECEIVE + (RECEIVED + 127) / 128 * 128, TABLE = 65536;
constexpr bool RING_FIRST = AFFINE || FREE + RING_BYTES <= TABLE;
constexpr int RING = RING_FIRST ? FREE : 2 * TABLE;
constexpr int PARTIALS = !RING_FIRST ? FREE : AFFINE ? RING + RING_BYTES : 2 * TABLE;
constexpr int END = RING_FIRST ? PARTIALS + SUM_BYTES : RING + RING_BYTES;
static_assert(AFFINE || (RING_FIRST ? RING + RING_BYTES : PARTIALS + SUM_BYTES) <= TABLE);
static_assert(END <= 232448 + 1024);

#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END - 1024);  // what the host asks for
#endif

KERNEL __launch_bounds__(THREADS, 1) IN_CLUSTERS
w4_few(const char* __restrict__ codes, const char* __restrict__ scales, const char* __restrict__ zeros,
       const float* __restrict__ nested, const float* __restrict__ map, const char* __restrict__ x,
       char* __restrict__ y, int rows, int N, GRID_CONSTANT Parts parts) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
    const int slice = warp % KWARPS, my_block = warp / KWARPS;
    const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int units = N / (16 * RBLOCKS), blocks = N / 16;
    const int rounds = cluster < units ? (units - cluster + clusters - 1) / clusters : 0;
    const int first_chunk = (rank * KWARPS + slice) * CHUNKS;
    const uint32_t ring = RING + warp * STAGES * CHUNK_BYTES;

    // What the next copies read: a lane's place in the codes; beside it lanes 0, 1 copy scales (or absmax) and lane 2
    // zeros, and lanes 0 to 15 a row's nested absmax each.
    const int block_step = clusters * RBLOCKS;
    int next_block = cluster * RBLOCKS + my_block, next_absmax = 0;
    uint32_t next_stage = here + ring;
    const char* next_codes = codes + (size_t(next_block) * TILES + first_chunk * 2) * 512 + lane * 16;
    const char* side = AFFINE ? (lane < 2 ? scales + lane * 16 : zeros) : scales + lane * blocks * 16;
    const int side_bytes = AFFINE && lane == 2 ? 8 : AFFINE ? 32 : 16;
    const int absmax_row = (lane >> 1 | (lane & 1) << 3) * TILES + first_chunk * 2;  // as absmax is interleaved
    auto fetch = [&](int c) {  // c, known to the compiler: chunk of the warp's slice
        if (next_block < blocks) {
            const uint32_t to = next_stage + lane * 16;
            copy16(to, next_codes + c * 1024);
            copy16(to + 512, next_codes + c * 1024 + 512);
            if (AFFINE) {
                const char* from = side + size_t((first_chunk + c) * blocks + next_block) * side_bytes;
                if (lane < 2) copy16(to + 1024, from);
                if (lane == 2) copy8(to + 1024, from);
            } else {
                if (lane < 2) copy16(to + 1024, side + size_t((first_chunk + c) * 2 * blocks + next_block) * 16);
                if (c == 0) next_absmax = first_absmax(parts, next_block, TILES) + absmax_row;
                if (lane < 16) copy4(next_stage + 1056 + lane * 4, nested + ((next_absmax + c * 2) >> 8));
            }
        }
        copies_commit();
        next_stage = next_stage == here + ring + (STAGES - 1) * CHUNK_BYTES ? here + ring : next_stage + CHUNK_BYTES;
        if (c == CHUNKS - 1) next_block += block_step, next_codes += size_t(block_step) * TILES * 512;
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch(i % CHUNKS);

    // activations: rows of 128 bytes, coalesced, through shared memory into B fragments
    uint32_t b[CHUNKS * 2][NT][8];
    uint4 loaded[CHUNKS * 2][NT * 2];
#pragma unroll
    for (int tile = 0; tile < CHUNKS * 2; tile++)
#pragma unroll
        for (int j = 0; j < NT * 2; j++) {
            const int row = 4 * j + (lane >> 3);
            loaded[tile][j] = make_uint4(0, 0, 0, 0);
            if (row < rows)
                loaded[tile][j] = load_global16(x + size_t(row) * K * 2 + (first_chunk * 2 + tile) * 128 + (lane & 7) * 16);
        }
    if (!AFFINE) fill_wide_table(window + TABLE, map, thread, THREADS);
    char* staging = window + PARTIALS + warp * NT * 1024;
#pragma unroll
    for (int tile = 0; tile < CHUNKS * 2; tile++) {
#pragma unroll
        for (int j = 0; j < NT * 2; j++) {
            const int row = 4 * j + (lane >> 3);
            *reinterpret_cast<uint4*>(staging + row * 128 + ((lane ^ row) & 7) * 16) = loaded[tile][j];
        }
        sync_warp();
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                load_matrices(&b[tile][n][half * 4], shared_address(staging) + (n * 8 + (lane & 7)) * 128 +
                                                         (((half * 4 + (lane >> 3)) ^ lane) & 7) * 16);
        sync_warp();
    }
    if (CLUSTER > 1) cluster_arrive();  // everybody's shared memory exists once this phase is over
    sync_block();

    const uint32_t base = here + TABLE + lane * 4;
    auto store = [&](int unit, int line, int quarter, float4 v) {
        const int m = line / RBLOCKS, block = unit * RBLOCKS + line % RBLOCKS;
        *reinterpret_cast<uint2*>(y + (size_t(m) * N + block * 16 + quarter * 4) * 2) = {to_halves(v.x, v.y), to_halves(v.z, v.w)};
    };
    auto add_shares = [&](int round) {
        const int unit = cluster + round * clusters;
        const float4* from = reinterpret_cast<const float4*>(window + RECEIVE) + (round & 1) * CLUSTER * OWNED * 4;
        for (int i = thread; i < OWNED * 4; i += THREADS) {
            const int line = (i >> 2) * CLUSTER + rank;
            if (line >= rows * RBLOCKS) continue;
            float4 sum = from[i];
#pragma unroll
            for (int share = 1; share < CLUSTER; share++) {
                const float4 v = from[share * OWNED * 4 + i];
                sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
            }
            store(unit, line, i & 3, sum);
        }
    };

    uint32_t this_stage = ring;
    for (int round = 0; round < rounds; round++) {
        const int unit = cluster + round * clusters;
        const float offset = AFFINE ? 0 : part_of(parts, unit * RBLOCKS + my_block).offset;
        float sum[NT][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            copies_wait<STAGES - 2>();
            sync_warp();
            const char* stage = window + this_stage;
            this_stage = this_stage == ring + (STAGES - 1) * CHUNK_BYTES ? ring : this_stage + CHUNK_BYTES;
            const uint4 word[2] = {*reinterpret_cast<const uint4*>(stage + lane * 16),
                                   *reinterpret_cast<const uint4*>(stage + 512 + lane * 16)};
            uint32_t low_zero = 0, high_zero = 0;
            float scale[2][2];
            if (AFFINE) {
                const uint32_t both = *reinterpret_cast<const uint32_t*>(stage + 1024 + g * 4);
                const uint32_t packed = *reinterpret_cast<const uint8_t*>(stage + 1056 + g);
                scale[0][0] = to_float(both & 0xffff), scale[0][1] = to_float(both >> 16);
                low_zero = low_zero_of(packed), high_zero = high_zero_of(packed);
            } else {
                const float* outer = reinterpret_cast<const float*>(stage + 1056) + 2 * g;
                const float outer_low = outer[0], outer_high = outer[1];
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const uint32_t both = *reinterpret_cast<const uint16_t*>(stage + 1024 + tile * 16 + g * 2);
                    scale[tile][0] = look_up_float(entry<0>(both, base + 128)) * outer_low + offset;
                    scale[tile][1] = look_up_float(entry<1>(both, base + 128)) * outer_high + offset;
                }
            }
            fetch((c + STAGES - 1) % CHUNKS);  // overwrites the stage before this one, which every lane has read
            float part[NT][4] = {};
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const uint32_t words[4] = {word[tile].x, word[tile].y, word[tile].z, word[tile].w};
                uint32_t a[4][4];
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    if (AFFINE) decode_affine(words[s], low_zero, high_zero, a[s]);
                    else decode_nf4_wide(words[s], base, a[s]);
                }
#pragma unroll
                for (int n = 0; n < NT; n++) {
#pragma unroll
                    for (int s = 0; s < 4; s++) mma(part[n], a[s], b[c * 2 + tile][n][s * 2], b[c * 2 + tile][n][s * 2 + 1]);
                    if (!AFFINE || tile == 1) {
                        const float low = scale[AFFINE ? 0 : tile][0], high = scale[AFFINE ? 0 : tile][1];
                        sum[n][0] += low * part[n][0], sum[n][1] += low * part[n][1];
                        sum[n][2] += high * part[n][2], sum[n][3] += high * part[n][3];
#pragma unroll
                        for (int i = 0; i < 4; i++) part[n][i] = 0;
                    }
                }
            }
        }
        // partials [row m][output], so that a line of 16 outputs can be read 16 bytes at a time
        float* partial = reinterpret_cast<float*>(window + PARTIALS) + ((round & 1) * WARPS + warp) * PARTIAL;
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) partial[(n * 8 + 2 * t + (i & 1)) * 20 + g + 8 * (i >> 1)] = sum[n][i];
        sync_block();
        if (CLUSTER > 1) {
            cluster_wait();
            if (round > 0) add_shares(round - 1);
        }
        constexpr int ADDENDS = KWARPS >= 8 ? 8 : KWARPS >= 4 ? 4 : KWARPS >= 2 ? 2 : 1;
        constexpr int AT_ONCE = 8 / ADDENDS;  // lines of a warp
        const int lines = rows * RBLOCKS, addend = g % ADDENDS;
        const int turn = (warp + round * 5) % WARPS;  // few lines: another warp adds each time
        for (int first = turn * AT_ONCE; first < lines; first += WARPS * AT_ONCE) {
            const int line = first + g / ADDENDS;
            float4 v = make_float4(0, 0, 0, 0);
            if (line < lines) {
                const float* from = reinterpret_cast<const float*>(window + PARTIALS) + (round & 1) * WARPS * PARTIAL +
                                    line % RBLOCKS * KWARPS * PARTIAL + line / RBLOCKS * 20 + t * 4;
#pragma unroll
                for (int j = 0; j < (KWARPS + ADDENDS - 1) / ADDENDS; j++) {
                    const int w = addend + j * ADDENDS;
                    if (KWARPS % ADDENDS == 0 || w < KWARPS) {
                        const float4 p = *reinterpret_cast<const float4*>(from + w * PARTIAL);
                        v.x += p.x, v.y += p.y, v.z += p.z, v.w += p.w;
                    }
                }
            }
#pragma unroll
            for (int mask = 4; mask < 4 * ADDENDS; mask *= 2) {
                v.x += shuffle_xor(v.x, mask), v.y += shuffle_xor(v.y, mask);
                v.z += shuffle_xor(v.z, mask), v.w += shuffle_xor(v.w, mask);
            }
            if (addend == 0 && line < lines) {
                if (CLUSTER == 1) store(unit, line, t, v);
                else
                    store_remote(here + RECEIVE + ((((round & 1) * CLUSTER + rank) * OWNED + line / CLUSTER) * 16 + t * 4) * 4,
                                 line % CLUSTER, v);
            }
        }
        if (CLUSTER > 1) cluster_arrive();
    }
    if (CLUSTER > 1) {
        cluster_wait();
        if (rounds > 0) add_shares(rounds - 1);
    }
}
