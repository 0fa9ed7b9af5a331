// 16-bit linear for few rows: y = x W^T + bias as y^T = W x^T, so that R weights' rows are the 64-row side of wgmma and T
// rows of x its narrow one. Nothing is decoded: both operands go from memory to the tensor cores as they are.
//
//   producer (one thread): boxes of W [R][64 K] and x [T][64 K] under the 128-byte swizzle into STAGES stages of KS * 64 K.
//       The first STAGES stages of weights are asked for before the kernel that makes x is over
//   WGS consumer warpgroups: 64 * RT outputs each
//
// Work: one block a multiprocessor (PER_SM), all at once. Tiles that do not fill a round of the grid are cut by K: laid end
// to end, every block takes an equal stretch of steps, then its whole tiles, so that all stream equally many bytes. Who has
// only a part of a tile leaves its sums in the workspace; at the end everybody adds a share of each tile that it had a part
// in, parts in the order of K: bits do not depend on the run.
//
// No flags and no fences, each of which would cost a way to the L2 and back: a number in the workspace says itself that it
// is there. All are ABSENT, a NaN that no sum is, before and after a launch: who takes a number puts ABSENT back. So a
// captured graph can be replayed. All launches on one workspace follow each other on one stream.
//
// SHARE == 2: blocks in pairs, a cluster; neighbouring outputs and the same K. Each fetches half of x for both.
#include "machine.h"
#ifdef __CUDACC__
#include "wgmma_shared.h"
#endif

#ifndef TILE
#define TILE 16
#endif
#ifndef RT
#define RT 1
#endif
#ifndef WGS
#define WGS 2
#endif
#ifndef KS
#define KS 2
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SHARE
#define SHARE 1
#endif
#ifndef PER_SM
#define PER_SM 1
#endif
#ifndef EARLY  // the next launch may begin at once, else when this one has asked for its last weights
#define EARLY 0
#endif
#ifndef AHEAD  // further steps of weights that are brought into the L2 before the wait
#define AHEAD 0
#endif
#if SHARE > 1
#define IN_CLUSTERS __cluster_dims__(SHARE, 1, 1)
#else
#define IN_CLUSTERS
#endif
constexpr int T = TILE, R = 64 * RT * WGS, J = T / 8, WARPS = WGS * 4, CONSUMERS = WARPS * 32;
constexpr bool LARGE = RT * T >= 128;  // the sums need more registers than an equal share: setmaxnreg wants warpgroups
constexpr int THREADS = CONSUMERS + (LARGE ? 128 : 32);
constexpr int W_BYTES = R * 128, X_BYTES = T * 128, STAGE_BYTES = KS * (W_BYTES + X_BYTES);
// offsets into shared memory
constexpr int FULL = 0, EMPTY = FULL + 8 * STAGES, OUT = 512, PIECE_BYTES = 256;
constexpr int RING = (OUT + WARPS * PIECE_BYTES + 1023) / 1024 * 1024, END = RING + STAGES * STAGE_BYTES;
constexpr int BEHIND = LARGE ? 1 : 0;  // steps that the tensor cores may be: where they wait for memory, a stage is free sooner
constexpr int ROOM = LARGE || END > 115712 ? 1 : 2;  // blocks that a multiprocessor holds, the next launch's among them
constexpr int CONSUMER_REGISTERS = WGS == 2 ? 232 : 152, PRODUCER_REGISTERS = WGS == 2 ? 40 : 56;
static_assert(STAGES * 16 <= OUT && R <= 256 && END <= 232448 && PER_SM <= ROOM && SHARE <= 2 && (T / SHARE) % 8 == 0);
static_assert(!LARGE || WGS == 2 || WGS == 3);
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END);  // what the host asks for
#endif

// A stretch of one tile: `count` steps from step `first`.
struct Stretch {
    int tile, first, count;
};
// What a block (or pair) does, in order: its stretches of the cut tiles 0 .. cut, then whole tiles.
struct Work {
    int tile_steps, cut, total, cutters, at, end, whole, tiles, blocks;
    DEVICE Work(int tiles, int tile_steps, int block, int blocks) : tile_steps(tile_steps), tiles(tiles), blocks(blocks) {
        const int rest = tiles % blocks;
        cut = rest * 32 > blocks * 31 ? 0 : rest;  // nearly full: a cut costs more
        total = cut * tile_steps;
        cutters = total < blocks ? total : blocks;
        at = block < cutters ? start(block) : 0, end = block < cutters ? start(block + 1) : 0;
        whole = cut + block;
    }
    DEVICE int start(int block) const { return total * block / cutters; }
    DEVICE int block_of(int step) const { return ((step + 1) * cutters - 1) / total; }
    DEVICE bool next(Stretch& s) {
        if (at < end) {
            const int tile = at / tile_steps, first = at - tile * tile_steps;
            const int left = tile_steps - first, mine = end - at;
            s = {tile, first, left < mine ? left : mine};
            at += s.count;
            return true;
        }
        if (whole >= tiles) return false;
        s = {whole, 0, tile_steps};
        whole += blocks;
        return true;
    }
};
// Step by step through a block's work, for the producer.
struct Cursor {
    Work work;
    int row_tiles, neighbour, n, m, step, left;
    DEVICE Cursor(const Work& work, int row_tiles, int neighbour)
        : work(work), row_tiles(row_tiles), neighbour(neighbour), n(0), m(0), step(0), left(0) {}
    DEVICE bool next() {
        if (left == 0) {
            Stretch s;
            if (!work.next(s)) return false;
            n = (s.tile / row_tiles * SHARE + neighbour) * R, m = s.tile % row_tiles * T;
            step = s.first - 1, left = s.count;
        }
        step++, left--;
        return true;
    }
};

// x [rows][K], W [N][K], y [rows][N]; K and N multiples of 8, what a box has beyond them is zero. bias [N] or null.
// workspace: float32 [gridDim.x][2][R * T], all ABSENT before the first launch.
KERNEL __launch_bounds__(THREADS, ROOM) IN_CLUSTERS
dense_stream(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, const uint16_t* __restrict__ bias, char* __restrict__ y,
           float* workspace, int rows, int N, int K) {
    SHARED_MEMORY
    const uint32_t here = shared_address(shared);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, block = blockIdx.x;
    const int neighbour = block % SHARE, row_tiles = (rows + T - 1) / T;
    const int tiles = (N + R * SHARE - 1) / (R * SHARE) * row_tiles, tile_steps = (K + KS * 64 - 1) / (KS * 64);
    Work work(tiles, tile_steps, block / SHARE, gridDim.x / SHARE);

    if (thread == CONSUMERS) {
        if ((here & 1023) != 0) stop();
        prefetch_map(&w_map), prefetch_map(&x_map);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(here + FULL + 8 * i, 1);
            barrier_init(here + EMPTY + 8 * i, WARPS * SHARE);
        }
        barriers_visible();
    }
    if (EARLY) release_successor();
    sync_block();
    if (SHARE > 1) cluster_arrive(), cluster_wait();

    if (warp >= WARPS) {
        if (LARGE) registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) {
            auto fetch_weights = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES;
                barrier_expect(full, STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < KS; i++)
                    copy_box(to + i * W_BYTES, &w_map, (at.step * KS + i) * 64, at.n, full, row_tiles == 1 ? READ_ONCE : KEEP);
            };
            auto fetch_x = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES + KS * W_BYTES;
#pragma unroll
                for (int i = 0; i < KS; i++) {
                    const int column = (at.step * KS + i) * 64;
                    if (SHARE == 1) copy_box(to + i * X_BYTES, &x_map, column, at.m, full, KEEP);
                    else
                        copy_box_to_pair(to + i * X_BYTES + neighbour * (X_BYTES / SHARE), &x_map, column,
                                         at.m + neighbour * (T / SHARE), full, KEEP);
                }
            };
            Cursor ahead(work, row_tiles, neighbour), at(work, row_tiles, neighbour);
            int fetched = 0;
            while (fetched < STAGES && ahead.next()) fetch_weights(ahead, fetched++);
            for (int i = 0; i < AHEAD && ahead.next(); i++)
                for (int j = 0; j < KS; j++) prefetch_box(&w_map, (ahead.step * KS + j) * 64, ahead.n);
            await_predecessor();
            for (int i = 0; i < fetched; i++) at.next(), fetch_x(at, i);
            uint32_t stage = 0, phase = 0;
            if (fetched == STAGES)
                while (at.next()) {
                    barrier_wait(here + EMPTY + 8 * stage, phase);
                    fetch_weights(at, stage);
                    fetch_x(at, stage);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            if (!EARLY) release_successor();  // whose first weights are on their way while this launch adds up
        }
        sync_warp();
        if (SHARE > 1) cluster_arrive(), cluster_wait();  // nobody leaves before the other's last word
        return;
    }

    if (LARGE) registers_raise<CONSUMER_REGISTERS>();
    await_predecessor();  // which may still read y, or add its own parts
    const int group = warp >> 2, quarter = warp & 3;
    uint32_t stage = 0, phase = 0, done = 0;  // `done`: the stage given back next
    float sum[RT][J * 4];
    auto give_back = [&]() {  // to whoever fills it
        if (SHARE == 1) {
            if (lane == 0) barrier_arrive(here + EMPTY + 8 * done);
        } else if (lane < SHARE)
            arrive_in_pair(here + EMPTY + 8 * done, lane);
        if (++done == STAGES) done = 0;
    };
    auto multiply = [&](int count) {
        for (int step = 0; step < count; step++) {
            barrier_wait(here + FULL + 8 * stage, phase);
            const uint32_t from = here + RING + stage * STAGE_BYTES;
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < KS; i++) {
                const uint64_t x = descriptor(from + KS * W_BYTES + i * X_BYTES);
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    const uint64_t w = descriptor(from + i * W_BYTES + (group * RT + r) * 8192);
#pragma unroll
                    for (int s = 0; s < 4; s++) wgmma_shared<T>(sum[r], w + 2 * s, x + 2 * s, step + i + s > 0);
                }
            }
            wgmma_commit();
            if (++stage == STAGES) stage = 0, phase ^= 1;
            wgmma_wait<BEHIND>();
            if (step >= BEHIND) give_back();
        }
        if (BEHIND) wgmma_wait<0>(), give_back();
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int i = 0; i < J * 4; i++) hold(sum[r][i]);
    };
    auto bias_of = [&](int column) {  // of this lane's two outputs of 16
        const int output = column + (lane >> 2);
        return make_float2(bias && output < N ? load_number(bias + output) : 0, bias && output + 8 < N ? load_number(bias + output + 8) : 0);
    };
    // 8 rows of y, 16 outputs: turned in the warp's own shared memory, 32 bytes a row
    const uint32_t piece = OUT + warp * PIECE_BYTES, turned = piece + (lane & 7) * 32 + (((lane >> 3) ^ (lane >> 2)) & 1) * 16;
    auto write = [&](const float* v, float2 added, int row, int column) {
        store_two_transposed(here + turned, to_pair(v[0] + added.x, v[1] + added.x), to_pair(v[2] + added.y, v[3] + added.y));
        sync_warp();
        const int m = lane >> 1, half = lane & 1;
        if (lane < 16 && row + m < rows && column + half * 8 < N)
            *reinterpret_cast<uint4*>(y + (size_t(row + m) * N + column + half * 8) * 2) =
                *reinterpret_cast<const uint4*>(shared + piece + m * 32 + ((half ^ (m >> 2)) & 1) * 16);
        sync_warp();
    };

    int inner_tile = -1, outer_tile = -1;  // of which this block has a part: from an inner step on, from the first
    Stretch s;
    while (work.next(s)) {
        multiply(s.count);
        const int n = (s.tile / row_tiles * SHARE + neighbour) * R, m = s.tile % row_tiles * T;
        if (s.count == tile_steps) {
#pragma unroll
            for (int r = 0; r < RT; r++) {
                const int column = n + ((group * RT + r) * 4 + quarter) * 16;
                const float2 added = bias_of(column);
#pragma unroll
                for (int j = 0; j < J; j++)
                    if (m + j * 8 < rows) write(&sum[r][j * 4], added, m + j * 8, column);
            }
        } else {
            (s.first == 0 ? outer_tile : inner_tile) = s.tile;
            float* to = workspace + (size_t(block) * 2 + (s.first == 0)) * (R * T) + thread * 4;
#pragma unroll
            for (int r = 0; r < RT; r++)
#pragma unroll
                for (int j = 0; j < J; j++)
                    if (m + j * 8 < rows) {
                        const float* v = &sum[r][j * 4];
                        part_give(to + (r * J + j) * CONSUMERS * 4, make_float4(v[0], v[1], v[2], v[3]));
                    }
        }
    }

#pragma unroll 1
    for (int slot = 0; slot < 2; slot++) {
        const int tile = slot ? outer_tile : inner_tile;
        if (tile < 0) continue;
        const int first = work.block_of(tile * tile_steps), last = work.block_of((tile + 1) * tile_steps - 1);
        const int sharers = last - first + 1;
        const int n = (tile / row_tiles * SHARE + neighbour) * R, m = tile % row_tiles * T;
        const int pieces = rows - m < T ? (rows - m + 7) / 8 : J;  // that have rows
        // an item: 8 rows of a warp's 16 outputs
        for (int item = block / SHARE - first + warp * sharers; item < RT * pieces * WARPS; item += sharers * WARPS) {
            const int from_warp = item % WARPS, j = item / WARPS % pieces, r = item / WARPS / pieces;
            float* from = workspace + ((r * J + j) * WARPS + from_warp) * 128 + lane * 4;
            float total[4] = {};
            for (int begin = 0; begin < sharers; begin += 8) {
                float4 v[8];
                float* part[8];  // of the first sharer the sums from the tile's first step on
#pragma unroll
                for (int i = 0; i < 8; i++)
                    part[i] = from + (size_t((first + begin + i) * SHARE + neighbour) * 2 + (begin + i == 0)) * (R * T);
                bool all;
                int tries = 0;
                do {
                    all = true;
#pragma unroll
                    for (int i = 0; i < 8; i++)
                        if (begin + i < sharers) v[i] = part_look(part[i]), all = all && is_there(v[i]);
                } while (!all && look_again(tries));
#pragma unroll
                for (int i = 0; i < 8; i++)
                    if (begin + i < sharers) {
                        part_take(part[i]);
                        total[0] += v[i].x, total[1] += v[i].y, total[2] += v[i].z, total[3] += v[i].w;
                    }
            }
            sync_warp();
            const int column = n + (((from_warp >> 2) * RT + r) * 4 + (from_warp & 3)) * 16;
            write(total, bias_of(column), m + j * 8, column);
        }
    }
    if (SHARE > 1) cluster_arrive(), cluster_wait();
}
