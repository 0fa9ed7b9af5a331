// silu(x G^T) * (x U^T) for many rows, G over U in one 16-bit weight. Each of the two products is rounded to 16 bits first, as
// kernels/gated_silu would find it in memory, which it never sees.
//
//   producer (one thread): boxes of x [T][64 K] and of the weight [R][64 K] under the 128-byte swizzle into STAGES stages.
//       The first STAGES stages of weights are asked for before the kernel that makes x is over
//   two consumer warpgroups: 64 rows each by all R columns, m64n256k16 with both operands in shared memory
//
// Of a tile's R columns the first half are gates' and the others their ups', so that one thread has both of an output. Outputs
// leave by stmatrix for a warp's own shared memory, 16 rows of 64 columns at a time, and from there by the copy engine, which
// knows where y ends; meanwhile the producer fetches the next tile's stages. The second warpgroup stays a step behind the
// first, so that each writes while the other multiplies.
//
// Work: one block a multiprocessor, all at once; whole tiles in turn, row tiles innermost: those of one weight tile run at the
// same time, so that it is read from memory once and x stays in the L2. Nothing is cut by K: bits do not depend on the run.
//
// Blocks in pairs, a cluster: the tiles of two neighbouring row tiles and one weight tile. A tile alone asks 48 KB of the L2 for
// 1,024 clocks of the tensor cores, more than it has for all multiprocessors at once. So one fetches the gates for both, the
// other the ups.
#include "box_stores.h"
#ifdef __CUDACC__
#include "wgmma_shared.h"
#endif

constexpr int STAGES = 4, PAIR_OF_BLOCKS = 2;
constexpr int T = 128, R = 256, OUTPUTS = R / 2;  // a tile's rows, rows of the weight, columns of y
constexpr int WARPS = 8, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 128;
constexpr int HALF_BYTES = OUTPUTS * 128, W_BYTES = 2 * HALF_BYTES, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int PIECE = 64, PIECE_BYTES = 16 * PIECE * 2;  // columns, and a warp's 16 rows of them, on their way to y
// offsets into shared memory
constexpr int FULL = 0, EMPTY = FULL + 8 * STAGES, OUT = 1024, RING = OUT + WARPS * 2 * PIECE_BYTES;
constexpr int END = RING + STAGES * STAGE_BYTES;
constexpr int CONSUMER_REGISTERS = 232, PRODUCER_REGISTERS = 40;
static_assert(END <= 232448);
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

// x [rows][K], w [2 * columns][K], y [rows][columns]; K and columns multiples of 8, what a box has beyond them is zero.
// gridDim.x: even, no more pairs than run at once.
KERNEL __launch_bounds__(THREADS, 1) __cluster_dims__(PAIR_OF_BLOCKS, 1, 1)
gated_tile(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map, GRID_CONSTANT TensorMap y_map, int rows, int columns,
           int K) {
    SHARED_MEMORY
    const uint32_t here = shared_address(shared);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, rank = blockIdx.x % PAIR_OF_BLOCKS;
    const int row_tiles = (rows + T * PAIR_OF_BLOCKS - 1) / (T * PAIR_OF_BLOCKS);  // a pair's
    const int tiles = row_tiles * ((columns + OUTPUTS - 1) / OUTPUTS), steps = (K + 63) / 64;
    const int stride = gridDim.x / PAIR_OF_BLOCKS, first = blockIdx.x / PAIR_OF_BLOCKS;
    auto row_of = [&](int tile) { return (tile % row_tiles * PAIR_OF_BLOCKS + rank) * T; };
    auto column_of = [&](int tile) { return tile / row_tiles * OUTPUTS; };
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
            barrier_init(here + EMPTY + 8 * i, WARPS * PAIR_OF_BLOCKS);
        }
        barriers_visible();
    }
    sync_block();
    cluster_arrive(), cluster_wait();

    if (warp >= WARPS) {
        registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) {
            auto fetch_weights = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES;
                barrier_expect(full, STAGE_BYTES);
                copy_box_to_pair(to + rank * HALF_BYTES, &w_map, at.step * 64, at.column + rank * columns, full, NORMAL);
            };
            auto fetch_x = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES + W_BYTES;
                copy_box(to, &x_map, at.step * 64, at.row, full, KEEP);
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
        cluster_arrive(), cluster_wait();  // nobody leaves before the other's last word
        return;
    }

    registers_raise<CONSUMER_REGISTERS>();
    await_predecessor();  // which may still read y
    const int group = warp >> 2, quarter = warp & 3;
    uint32_t stage = 0, phase = 0, done = 0;  // `done`: the stage given back next
    float sum[R / 2];
    auto give_back = [&]() {
        if (lane < PAIR_OF_BLOCKS) arrive_in_pair(here + EMPTY + 8 * done, lane);  // both write into it
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
                    const float* const gate = sum + (p * (PIECE / 8) + pair * 2 + i / 2) * 4 + i % 2 * 2;
                    four[i] = gated_pair(gate, gate + R / 4);
                }
                store_matrices(to_row + p % 2 * PIECE_BYTES + (((pair * 2 + (lane >> 4)) ^ (matrix_row & 7)) << 4), four);
            }
            fence_copies();
            sync_warp();
            if (lane == 0) store_box(&y_map, piece + p % 2 * PIECE_BYTES, column + p * PIECE, row), stores_commit();
        }
    };

    if (group == 1 && first < tiles) sync_named<1, CONSUMERS>();  // until the first has begun
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
            if (group == 0 && tile == first && step == 0) arrive_named<1, CONSUMERS>();
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
    cluster_arrive(), cluster_wait();
}
