// W4 linear for 17 rows and more: wgmma with the dequantized weights as the register operand. Computes y^T = W x^T, so
// that weights are the 64-row side and R outputs x T activations rows are a tile; layout of weights: w4_layout.py.
//
//   producer (one thread): x [T][64 K] boxes under the 128-byte swizzle and codes [R/16][512 * KS bytes] boxes through
//       tensor maps, scales (and zeros) of R outputs as plain bulk copies, into STAGES stages of KS * 64 K
//   WGS consumer warpgroups: 64 * RT outputs each, a warp 16 of every 64. It reads its tile of codes (16 bytes a lane)
//       and decodes the next 64 of K into one set of fragments while the tensor cores work on the other set.
//
// SPLIT > 1: a cluster shares a tile, each block has a share of K; partial sums go to the shared memory of the block
// that owns their rows of activations and are added there in a fixed order. SPLIT == 1: persistent over tiles.
// SHARE > 1: blocks of a cluster with neighbouring outputs and the same K; each fetches its part of x for all of them.
#include "w4_device.h"

#ifndef AFFINE
#define AFFINE 0
#endif
#ifndef TILE
#define TILE 64
#endif
#ifndef RT
#define RT 2
#endif
#ifndef WGS
#define WGS 2
#endif
#ifndef KS
#define KS 2
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
#ifndef SHARE
#define SHARE 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef PERMUTED  // words of four that NF4 decodes without the table: shared memory is busy with wgmma
#define PERMUTED 0
#endif
constexpr int CLUSTER = SPLIT * SHARE;
#if SPLIT * SHARE > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif
constexpr int T = TILE, R = 64 * RT * WGS, THREADS = 128 * (WGS + 1), J = T / 8, CONSUMERS = WGS * 128;
constexpr int X_BYTES = T * 128, CODE_BYTES = R * 32 * KS;
constexpr int SCALE_BYTES = AFFINE ? R * 2 : R * KS, ZERO_BYTES = AFFINE ? R / 2 : 0;
constexpr int CODES = KS * X_BYTES, SCALES = CODES + CODE_BYTES, ZEROS = SCALES + SCALE_BYTES;
constexpr int STAGE_BYTES = (ZEROS + ZERO_BYTES + 1023) / 1024 * 1024;
constexpr uint32_t ARRIVING = KS * X_BYTES + CODE_BYTES + SCALE_BYTES + ZERO_BYTES;
// addresses in shared memory; the first 1024 bytes are the system's
constexpr int FULL = 1024, EMPTY = FULL + 8 * STAGES, MAP = 1280, OUT = MAP + 1024, TABLE = 32768;
constexpr int OUT_ROWS = T < 64 ? T : 64, OUT_BYTES = OUT_ROWS * 32;
constexpr int RING = AFFINE ? (OUT + WGS * 4 * OUT_BYTES + 1023) / 1024 * 1024 : 65536;
constexpr int END = RING + STAGES * STAGE_BYTES;
constexpr int RECEIVED = SPLIT > 1 ? R * T * 4 : 0;  // in the place of the ring
static_assert(OUT + WGS * 4 * OUT_BYTES <= 32768 && END <= 232448 + 1024 && RECEIVED <= STAGES * STAGE_BYTES);
static_assert(J % SPLIT == 0 && STAGES * 16 <= 256);
constexpr int CONSUMER_REGISTERS = WGS == 2 ? 232 : 152, PRODUCER_REGISTERS = WGS == 2 ? 40 : 56;


#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END - 1024);  // what the host asks for
#endif

KERNEL __launch_bounds__(THREADS, 1) IN_CLUSTERS
w4_tile(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap code_map, const char* __restrict__ scales,
        const char* __restrict__ zeros, const float* __restrict__ nested, const float* __restrict__ map,
        char* __restrict__ y, int rows, int N, int K, GRID_CONSTANT Parts parts) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int rank = blockIdx.x % CLUSTER / SHARE, neighbour = blockIdx.x % SHARE;
    const int cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    const int row_tiles = (rows + T - 1) / T, tiles = N / (R * SHARE) * row_tiles;
    const int steps = K / 64 / KS / SPLIT, first_step = rank * steps;

    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(here + FULL + 8 * i, 1);
            barrier_init(here + EMPTY + 8 * i, WGS * 4 * SHARE);
        }
        barriers_visible();
    }
    if (!AFFINE) {
        fill_table(window + TABLE, thread, THREADS);
        for (int i = thread; i < 256; i += THREADS) reinterpret_cast<float*>(window + MAP)[i] = load_global(map + i);
    }
    sync_block();
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();

    if (warp >= WGS * 4) {
        registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) {
            uint32_t stage = 0, phase = 0;
            for (int tile = cluster; tile < tiles; tile += clusters) {
                const int n = (tile / row_tiles * SHARE + neighbour) * R, m = tile % row_tiles * T;
#pragma unroll 1
                for (int step = first_step; step < first_step + steps; step++) {
                    barrier_wait(here + EMPTY + 8 * stage, phase ^ 1);
                    const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES;
                    barrier_expect(full, ARRIVING);
                    copy_box(to + CODES, &code_map, step * KS * 128, n / 16, full, row_tiles == 1 ? READ_ONCE : KEEP);
#pragma unroll
                    for (int i = 0; i < KS; i++) {
                        if (SHARE == 1) copy_box(to + i * X_BYTES, &x_map, (step * KS + i) * 64, m, full, KEEP);
                        else
                            copy_box_to_many(to + i * X_BYTES + neighbour * (X_BYTES / SHARE), &x_map, (step * KS + i) * 64,
                                             m + neighbour * (T / SHARE), full, ((1 << SHARE) - 1) << (rank * SHARE), KEEP);
                    }
                    if (AFFINE) {
                        const size_t at = size_t(step * KS / 2) * N + n;
                        copy_bulk(to + SCALES, scales + at * 2, SCALE_BYTES, full);
                        copy_bulk(to + ZEROS, zeros + at / 2, ZERO_BYTES, full);
                    } else {
#pragma unroll
                        for (int i = 0; i < KS; i++)
                            copy_bulk(to + SCALES + i * R, scales + size_t(step * KS + i) * N + n, R, full);
                    }
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        }
        sync_warp();
        if (SPLIT > 1) cluster_arrive(), cluster_wait();  // a cluster's barrier counts every thread
        if (CLUSTER > 1) cluster_arrive(), cluster_wait();  // nobody leaves before the others' last word
    } else {
        registers_raise<CONSUMER_REGISTERS>();
        const int g = lane >> 2, group = warp >> 2, quarter = warp & 3, all_tiles = K / 64;
        const uint32_t base = here + TABLE + lane * 4;
        const float* levels = reinterpret_cast<const float*>(window + MAP);
        uint32_t stage = 0, phase = 0, done = 0;  // `done`: the stage given back next
        float sum[RT][J * 4];
        uint32_t set[2][RT][4][4];

        auto give_back = [&]() {  // to whoever fills it
            if (SHARE == 1) {
                if (lane == 0) barrier_arrive(here + EMPTY + 8 * done);
            } else if (lane < SHARE)
                barrier_arrive_at(here + EMPTY + 8 * done, rank * SHARE + lane);
            if (++done == STAGES) done = 0;
        };
        for (int tile = cluster; tile < tiles; tile += clusters) {
            const int n = (tile / row_tiles * SHARE + neighbour) * R, m = tile % row_tiles * T;
            int absmax_at[RT];
            float offset[RT];
#pragma unroll
            for (int r = 0; r < RT; r++) {
                const int block = n / 16 + (group * RT + r) * 4 + quarter;
                absmax_at[r] = AFFINE ? 0 : first_absmax(parts, block, all_tiles) + g * all_tiles;
                offset[r] = AFFINE ? 0 : part_of(parts, block).offset;
            }
            // Codes of 64 K -> fragments, scaled in float16.
            auto decode = [&](int k_tile, int i, uint32_t (*fragments)[4][4]) {
                const char* from = window + RING + stage * STAGE_BYTES;
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const int block = (group * RT + r) * 4 + quarter;
                    const uint4 word = *reinterpret_cast<const uint4*>(from + CODES + (block * KS + i) * 512 + lane * 16);
                    uint32_t low, high, low_zero = 0, high_zero = 0;
                    if (AFFINE) {
                        const uint32_t both = *reinterpret_cast<const uint32_t*>(from + SCALES + block * 32 + g * 4);
                        const uint32_t packed = *reinterpret_cast<const uint8_t*>(from + ZEROS + block * 8 + g);
                        low = (both & 0xffff) * 0x10001u, high = (both >> 16) * 0x10001u;
                        low_zero = low_zero_of(packed), high_zero = high_zero_of(packed);
                    } else {
                        const uint32_t both = *reinterpret_cast<const uint16_t*>(from + SCALES + i * R + block * 16 + g * 2);
                        const float outer_low = load_global(nested + ((absmax_at[r] + k_tile) >> 8));
                        const float outer_high = load_global(nested + ((absmax_at[r] + 8 * all_tiles + k_tile) >> 8));
                        const float a = levels[both & 255] * outer_low + offset[r];
                        const float b = levels[both >> 8] * outer_high + offset[r];
                        low = to_halves(a, a), high = to_halves(b, b);
                    }
                    const uint32_t words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        uint32_t* a = fragments[r][s];
                        if (AFFINE) decode_affine(words[s], low_zero, high_zero, a);
                        else if (s < PERMUTED) decode_nf4_permuted(words[s], a);
                        else decode_nf4(words[s], base, a);
                        a[0] = multiply(a[0], low), a[1] = multiply(a[1], high);
                        a[2] = multiply(a[2], low), a[3] = multiply(a[3], high);
                    }
                }
            };
            const int substeps = steps * KS;  // even
            auto substep = [&](int at, int i, uint32_t (*fragments)[4][4]) {
                if (i == 0) barrier_wait(here + FULL + 8 * stage, phase);
                decode(first_step * KS + at, i, fragments);
                wgmma_fence();
                const uint64_t x = descriptor(here + RING + stage * STAGE_BYTES + i * X_BYTES);
#pragma unroll
                for (int r = 0; r < RT; r++)
#pragma unroll
                    for (int s = 0; s < 4; s++) wgmma<T>(sum[r], fragments[r][s], x + 2 * s, at > 0 || s > 0);
                wgmma_commit();
                if (i == KS - 1)
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                wgmma_wait<1>();  // the one before this is over: its fragments and its stage are free
                if (i == 0 && at > 0) {
                    give_back();
                }
            };
            for (int at = 0; at < substeps; at += 2) {
                substep(at, 0, set[0]);
                substep(at + 1, KS == 2 ? 1 : 0, set[1]);
            }
            wgmma_wait<0>();
            give_back();

            // [16 outputs][8 rows of activations] pieces, transposed in the warp's own shared memory: 32 bytes a row
            const uint32_t out = OUT + warp * OUT_BYTES;
            auto stage_piece = [&](int row, const float* v) {
                const int at = row + (lane & 7);
                store_two_transposed(here + out + at * 32 + (((lane >> 3) ^ (at >> 2)) & 1) * 16, to_halves(v[0], v[1]), to_halves(v[2], v[3]));
            };
            auto write_rows = [&](int count, int row, int column) {
                sync_warp();
                for (int i = lane; i < count * 2; i += 32) {
                    const int at = i >> 1, half = i & 1;
                    const uint4 v = *reinterpret_cast<const uint4*>(window + out + at * 32 + ((half ^ (at >> 2)) & 1) * 16);
                    if (row + at < rows) *reinterpret_cast<uint4*>(y + (size_t(row + at) * N + column + half * 8) * 2) = v;
                }
                sync_warp();
            };
            if (SPLIT == 1) {
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const int column = n + (group * RT + r) * 64 + quarter * 16;
#pragma unroll
                    for (int j = 0; j < J; j++) {
                        stage_piece(j * 8 % OUT_ROWS, &sum[r][j * 4]);
                        if ((j + 1) * 8 % OUT_ROWS == 0) write_rows(OUT_ROWS, m + (j + 1) * 8 - OUT_ROWS, column);
                    }
                }
            } else {
                constexpr int OWNED = J / SPLIT;  // pieces of 8 rows that a block adds
                cluster_arrive(), cluster_wait();  // every ring of the cluster is read
#pragma unroll
                for (int r = 0; r < RT; r++)
#pragma unroll
                    for (int j = 0; j < J; j++)
                        store_remote(here + RING + (((rank * RT + r) * OWNED + j % OWNED) * CONSUMERS + thread) * 16, j / OWNED * SHARE + neighbour,
                                     make_float4(sum[r][j * 4], sum[r][j * 4 + 1], sum[r][j * 4 + 2], sum[r][j * 4 + 3]));
                cluster_arrive(), cluster_wait();
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const int column = n + (group * RT + r) * 64 + quarter * 16;
                    const int row = m + rank * OWNED * 8;
#pragma unroll
                    for (int j = 0; j < OWNED; j++) {
                        float total[4] = {};
#pragma unroll
                        for (int share = 0; share < SPLIT; share++) {
                            const float4 v = *reinterpret_cast<const float4*>(
                                window + RING + (((share * RT + r) * OWNED + j) * CONSUMERS + thread) * 16);
                            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
                        }
                        stage_piece(j * 8 % OUT_ROWS, total);
                        if ((j + 1) * 8 % OUT_ROWS == 0) write_rows(OUT_ROWS, row + (j + 1) * 8 - OUT_ROWS, column);
                    }
                    if (OWNED * 8 % OUT_ROWS) write_rows(OWNED * 8 % OUT_ROWS, row + OWNED * 8 / OUT_ROWS * OUT_ROWS, column);
                }
            }
        }
        if (CLUSTER > 1 && SPLIT == 1) cluster_arrive(), cluster_wait();
    }
}
