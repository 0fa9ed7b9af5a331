// 16-bit linear for many rows: y = x W^T; or, GATED, y = silu(x G^T) * (x U^T) of W = G over U, each rounded to 16 bits first
// as kernels/gated_silu would find them in memory, which they never see.
//
//   producer (one thread): boxes of x [T][64 K] and W [256][64 K] under the 128-byte swizzle into STAGES stages.
//       The first STAGES stages of weights are asked for before the kernel that makes x is over
//   two consumer warpgroups: 64 rows each by all 256 columns, m64n256k16 with both operands in shared memory
//
// GATED: of a tile's 256 columns the first 128 are gates' and the others their ups', so that one thread has both of an output.
// Sums leave by stmatrix for a warp's own shared memory, 16 rows of 64 columns at a time, and from there by the copy engine,
// which knows where y ends; meanwhile the producer fetches the next tile's stages.
//
// Work: one block a multiprocessor, all at once; whole tiles in turn, row tiles innermost: those of one W tile run at the same
// time, so that it is read from memory once and x stays in the L2. Nothing is cut by K: bits do not depend on the run.
//
// Clusters: a tile asks 48 KB of the L2 for 1,024 clocks of the tensor cores, more than it has for all multiprocessors at once.
// SHARE_W blocks, one row tile below the other, fetch a part of their common W for all of them; SHARE_X blocks, side by side,
// a part of their common x.
//
// SKEW: the second warpgroup stays as many steps behind the first, so that each writes while the other multiplies.
#include "w16_device.h"

#ifndef GATED
#define GATED 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef SHARE_W
#define SHARE_W 1
#endif
#ifndef SHARE_X
#define SHARE_X 1
#endif
#ifndef SKEW
#define SKEW 0
#endif
#if SHARE_W * SHARE_X > 1
#define IN_CLUSTERS __cluster_dims__(SHARE_W * SHARE_X, 1, 1)
#else
#define IN_CLUSTERS
#endif
constexpr int T = 128, R = 256, OUTPUTS = GATED ? R / 2 : R;  // a tile's rows, rows of W, columns of y
constexpr int WARPS = 8, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 128;
constexpr int CLUSTER = SHARE_W * SHARE_X, WRITERS = SHARE_W + SHARE_X - 1;  // blocks that write into a block's stages
constexpr int W_BYTES = R * 128, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int W_BOX = R / SHARE_W < 128 ? R / SHARE_W : 128, W_COPIES = R / SHARE_W / W_BOX, X_BOX = T / SHARE_X;  // rows
constexpr int PIECE = 64, PIECE_BYTES = 16 * PIECE * 2;  // columns, and a warp's 16 rows of them, on their way to y
// offsets into shared memory
constexpr int FULL = 0, EMPTY = FULL + 8 * STAGES, OUT = 1024, RING = OUT + WARPS * 2 * PIECE_BYTES;
constexpr int END = RING + STAGES * STAGE_BYTES;
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;
static_assert(END <= 232448 && W_BOX % 8 == 0 && X_BOX % 8 == 0 && SKEW < STAGES);
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END);  // what the host asks for
#endif

DEVICE float number(uint32_t bits) {  // of the activations' type
    return BF16 ? bits_to_float(bits << 16) : to_float(uint16_t(bits));
}
DEVICE float gated(float gate, float up) { return gate * quick_reciprocal(1 + power_of_2(gate * -1.44269504f)) * up; }
DEVICE uint32_t gated_pair(const float* gate, const float* up) {
    const uint32_t g = to_pair(gate[0], gate[1]), u = to_pair(up[0], up[1]);
    return to_pair(gated(number(g), number(u)), gated(number(g >> 16), number(u >> 16)));
}

struct Cursor {  // a step of a tile, and where that is
    int tile, step, row, column;
};

// x [rows][K], W [N][K], y [rows][N], GATED [rows][N / 2]; K and y's columns multiples of 8, what a box has beyond them is zero.
// gridDim.x: a multiple of CLUSTER, no more clusters than run at once.
KERNEL __launch_bounds__(THREADS, 1) IN_CLUSTERS
w16_tile(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, GRID_CONSTANT TensorMap y_map, int rows, int N, int K) {
    SHARED_MEMORY
    const uint32_t here = shared_address(shared);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int rank = blockIdx.x % CLUSTER, down = rank % SHARE_W, across = rank / SHARE_W;
    const int row_tiles = (rows + T * SHARE_W - 1) / (T * SHARE_W);  // a cluster's, which are SHARE_W high and SHARE_X wide
    const int columns = GATED ? N / 2 : N, column_tiles = (columns + OUTPUTS * SHARE_X - 1) / (OUTPUTS * SHARE_X);
    const int tiles = row_tiles * column_tiles, steps = (K + 63) / 64, stride = gridDim.x / CLUSTER, first = blockIdx.x / CLUSTER;
    auto row_of = [&](int tile) { return (tile % row_tiles * SHARE_W + down) * T; };
    auto column_of = [&](int tile) { return (tile / row_tiles * SHARE_X + across) * OUTPUTS; };
    auto next = [&](Cursor& at) {  // step by step through this block's tiles
        if (++at.step == steps) {
            at.step = 0, at.tile += stride;
            at.row = row_of(at.tile), at.column = column_of(at.tile);
        }
        return at.tile < tiles;
    };

    if (thread == CONSUMERS) {
        if ((here & 1023) != 0) stop();
        prefetch_map(&w_map), prefetch_map(&x_map), prefetch_map(&y_map);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(here + FULL + 8 * i, 1);
            barrier_init(here + EMPTY + 8 * i, WARPS * WRITERS);
        }
        barriers_visible();
    }
    sync_block();
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();

    if (warp >= WARPS) {
        registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) {
            auto fetch_weights = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES;
                barrier_expect(full, STAGE_BYTES);
                const int second = at.column + (GATED ? columns : 128);  // half of the tile
#pragma unroll
                for (int i = 0; i < W_COPIES; i++) {
                    const int part = (down * W_COPIES + i) * W_BOX, row = part < 128 ? at.column + part : second + part - 128;
                    if (SHARE_W == 1) copy_box(to + part * 128, &w_map, at.step * 64, row, full, NORMAL);
                    else
                        copy_box_to_many(to + part * 128, &w_map, at.step * 64, row, full,
                                         ((1 << SHARE_W) - 1) << across * SHARE_W, NORMAL);
                }
            };
            auto fetch_x = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES + W_BYTES;
                const int part = across * X_BOX, row = at.row + part;
                if (SHARE_X == 1) copy_box(to, &x_map, at.step * 64, row, full, KEEP);
                else {
                    uint16_t ranks = 0;
#pragma unroll
                    for (int i = 0; i < SHARE_X; i++) ranks |= 1 << (i * SHARE_W + down);
                    copy_box_to_many(to + part * 128, &x_map, at.step * 64, row, full, ranks, KEEP);
                }
            };
            Cursor ahead = {first - stride, steps - 1, 0, 0}, at = ahead;
            int fetched = 0;
            while (fetched < STAGES && next(ahead)) fetch_weights(ahead, fetched++);
            await_predecessor();
            for (int i = 0; i < fetched; i++) next(at), fetch_x(at, i);
            uint32_t stage = 0, phase = 0;
            if (fetched == STAGES)
                while (next(at)) {
                    barrier_wait(here + EMPTY + 8 * stage, phase);
                    fetch_weights(at, stage);
                    fetch_x(at, stage);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            release_successor();
        }
        sync_warp();
        if (CLUSTER > 1) cluster_arrive(), cluster_wait();  // nobody leaves before the others' last word
        return;
    }

    registers_raise<CONSUMER_REGISTERS>();
    await_predecessor();  // which may still read y
    const int group = warp >> 2, quarter = warp & 3;
    // Whom this lane tells that a stage is free: those above and below, then those beside.
    const int beside = lane - SHARE_W, told = beside < 0 ? across * SHARE_W + lane : (beside + (beside >= across)) * SHARE_W + down;
    uint32_t stage = 0, phase = 0, done = 0;  // `done`: the stage given back next
    float sum[R / 2];
    auto give_back = [&]() {
        if (CLUSTER == 1) {
            if (lane == 0) barrier_arrive(here + EMPTY + 8 * done);
        } else if (lane < WRITERS)
            barrier_arrive_at(here + EMPTY + 8 * done, told);
        if (++done == STAGES) done = 0;
    };
    // A matrix of stmatrix has 8 rows: a lane says where one of them goes, of four matrices two below the other two.
    const int matrix_row = lane & 15;
    const uint32_t piece = here + OUT + warp * 2 * PIECE_BYTES, to_row = piece + matrix_row * 128;
    auto write = [&](int row, int column) {
#pragma unroll
        for (int p = 0; p < OUTPUTS / PIECE; p++) {
            if (lane == 0) stores_wait_read<1>();  // this room was last used for the piece before the last
            sync_warp();
#pragma unroll
            for (int pair = 0; pair < PIECE / 16; pair++) {
                uint32_t four[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float* const v = sum + (p * (PIECE / 8) + pair * 2 + i / 2) * 4 + i % 2 * 2;
                    four[i] = GATED ? gated_pair(v, v + R / 4) : to_pair(v[0], v[1]);
                }
                store_matrices(to_row + p % 2 * PIECE_BYTES + (((pair * 2 + (lane >> 4)) ^ (matrix_row & 7)) << 4), four);
            }
            fence_copies();
            sync_warp();
            if (lane == 0) store_box(&y_map, piece + p % 2 * PIECE_BYTES, column + p * PIECE, row), stores_commit();
        }
    };

    if (SKEW && group == 1 && first < tiles) sync_named<1, CONSUMERS>();
    for (int tile = first; tile < tiles; tile += stride) {
        for (int step = 0; step < steps; step++) {
            barrier_wait(here + FULL + 8 * stage, phase);
            const uint32_t from = here + RING + stage * STAGE_BYTES;
            const uint64_t w = descriptor(from), x = descriptor(from + W_BYTES + group * 8192);
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 4; s++) wgmma_shared<R>(sum, x + 2 * s, w + 2 * s, step + s > 0);
            wgmma_commit();
            if (++stage == STAGES) stage = 0, phase ^= 1;
            wgmma_wait<1>();
            if (step > 0) give_back();
            if (SKEW && group == 0 && tile == first && step == (SKEW < steps ? SKEW : steps) - 1) arrive_named<1, CONSUMERS>();
        }
        wgmma_wait<0>();
        give_back();
#pragma unroll
        for (int i = 0; i < R / 2; i++) hold(sum[i]);
        const int row = row_of(tile) + group * 64 + quarter * 16;
        if (row < rows) write(row, column_of(tile));
    }
    if (lane == 0) stores_wait<0>();
    sync_warp();
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();
}
