// W8A8 linear of any number of rows: y^T = W x^T, so that R outputs x T rows of activations are a tile; both operands
// go from memory to the tensor cores as they are. LLM.int8() with its outliers in the same pass, or (FP8) e4m3.
//
//   producer (one thread): W [R][128 K] and x [T][128 K] boxes of bytes under the 128-byte swizzle into STAGES stages
//   two consumer warpgroups: 64 * RT outputs each; int32 sums, or e4m3 sums that are moved to float32 every 128 of K
//   three warps beside the producer, for outliers: one copies the listed columns' codes out of each stage of W as it
//       passes, two fetch the 16-bit outliers, 32 columns at a time into one of two rooms. After the last stage sums become
//       floats, 64 outputs x up to 128 rows of x at a time, and the product of outliers is added: no second reading of W.
//
// Work: of all tiles the first `stream_tiles` are cut into equal numbers of steps of 128 K, one run a block, wherever
// a tile ends; the others go to the blocks whole, in turn.
//
// w8_layout.h has the constants and the shared memory, w8_work.h deals out tiles, w8_outliers.h is about columns with outliers,
// w8_finish.h about the way from sums to y.
#include "w8_finish.h"
#include "w8_outliers.h"

DEVICE void init_barriers(uint32_t here) {
    for (int i = 0; i < STAGES; i++) {
        barrier_init(here + FULL + 8 * i, 1);
        barrier_init(here + EMPTY + 8 * i, WGS * 4 + !FP8);
    }
    for (int i = 0; i < 2; i++) barrier_init(here + READY + 8 * i, 2), barrier_init(here + FREE + 8 * i, WGS * 4);
    barrier_init(here + CODED, 1);
    barrier_init(here + TAKEN, WGS * 4);
    barrier_init(here + LISTED, 1);
    barriers_visible();
}

// The role of one thread: W and x into the ring.
DEVICE void produce(uint32_t here, const Linear& linear, Work& work, const TensorMap* w_map, const TensorMap* x_map) {
    const uint64_t policy = linear.row_tiles == 1 ? READ_ONCE : NORMAL;
    Part part = {};
    auto fetch_weights = [&](int stage, int step) {
        barrier_expect(here + FULL + 8 * stage, STAGE_BYTES);
        copy_box(here + RING + stage * STAGE_BYTES, w_map, step * 128, linear.first_output(part.tile),
                 here + FULL + 8 * stage, policy);
    };
    // No kernel writes weights: the first stages' are fetched while the predecessor still works.
    const int first_at = work.at, first_whole = work.whole;
    int early = 0;
    while (early < STAGES && work.next(part))
        for (int step = part.begin; step < part.end && early < STAGES; step++) fetch_weights(early++, step);
    work.at = first_at, work.whole = first_whole;
    await_predecessor();
    release_successor();
    uint32_t stage = 0, phase = 0;
    while (work.next(part)) {
#pragma unroll 1
        for (int step = part.begin; step < part.end; step++) {
            if (early > 0) early--;
            else {
                barrier_wait(here + EMPTY + 8 * stage, phase ^ 1);
                fetch_weights(stage, step);
            }
            copy_box(here + RING + stage * STAGE_BYTES + W_BYTES, x_map, step * 128, linear.first_row(part.tile),
                     here + FULL + 8 * stage, KEEP);
            advance(stage, phase);
        }
    }
}

// A consumer warpgroup: a part's steps, as they come -> sums of RT * 64 outputs x T rows.
DEVICE void multiply(const Place& place, const Part& part, int group, Progress& at, Sum (&sum)[RT][T / 2]) {
    auto give_back = [&]() {
        if (place.lane == 0) barrier_arrive(place.here + EMPTY + 8 * at.done);
        if (++at.done == STAGES) at.done = 0;
    };
    auto a_at = [&](int r) { return descriptor(place.here + RING + at.stage * STAGE_BYTES + (group * RT + r) * 8192); };
    auto b_at = [&]() { return descriptor(place.here + RING + at.stage * STAGE_BYTES + W_BYTES); };
#if FP8
    float few[T / 2];  // the tensor cores keep 14 bits of a sum: 128 of K at a time
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
        for (int i = 0; i < T / 2; i++) sum[r][i] = 0;
    for (int step = part.begin; step < part.end; step++) {
        barrier_wait(place.here + FULL + 8 * at.stage, at.phase);
#pragma unroll
        for (int r = 0; r < RT; r++) {
            wgmma_fence();
#pragma unroll
            for (int s = 0; s < 4; s++) wgmma_fp8<T>(few, a_at(r) + 2 * s, b_at() + 2 * s, s > 0);
            wgmma_commit();
            wgmma_wait<0>();
            settle<T / 2>(few);
            if (r == RT - 1) give_back();
#pragma unroll
            for (int i = 0; i < T / 2; i++) sum[r][i] += few[i];
        }
        advance(at.stage, at.phase);
    }
#else
    for (int step = part.begin; step < part.end; step++) {
        barrier_wait(place.here + FULL + 8 * at.stage, at.phase);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 4; s++)
#pragma unroll
            for (int r = 0; r < RT; r++)
                wgmma_codes<T>(sum[r], a_at(r) + 2 * s, b_at() + 2 * s, step > part.begin || s > 0);
        wgmma_commit();
        advance(at.stage, at.phase);
        wgmma_wait<1>();
        if (step > part.begin) give_back();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int r = 0; r < RT; r++) settle<T / 2>(sum[r]);
    give_back();
#endif
}

KERNEL __launch_bounds__(THREADS, PER_SM)
w8_tile(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map,
        // what the predecessor wrote is not __restrict__: such a load may be moved to before the wait for it
        const float* x_steps, const float* __restrict__ w_steps, const uint16_t* x16, const uint32_t* bitmap,
        const int8_t* __restrict__ w, char* y, float* workspace, int* arrived, uint16_t* x_out, int* gathered, int rows,
        int N, int K, int stream_tiles, int x_out_columns, float threshold) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const Place place = {here, shared - 1024, thread, lane, warp};
    const Linear linear(rows, N, K);
    const Grid grid = {int(blockIdx.x), int(gridDim.x), stream_tiles, stream_tiles * linear.steps};
    const Listed listed(place.window);
    if (thread == 0) init_barriers(here);
    if (FP8 && thread == CONSUMERS) prefetch_map(&w_map), prefetch_map(&x_map);
    sync_block();

    Work work(linear, grid);
    if (warp >= WGS * 4) {
        if constexpr (MOVES_REGISTERS) registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) produce(here, linear, work, &w_map, &x_map);
        else if (!FP8 && warp > WGS * 4) {
            await_predecessor();
            const bool copies_codes = warp == WGS * 4 + 1;
            if (copies_codes) {
                listed.read(bitmap, linear, lane);
                if (lane == 0) barrier_arrive(here + LISTED);
            }
            barrier_wait(here + LISTED, 0);
            if (copies_codes) copy_codes(place, listed, work);
            else fetch_outliers(place, listed, {x16, x_out, x_out_columns, threshold}, linear, work, gathered);
        }
        return;
    }

    if constexpr (MOVES_REGISTERS) registers_raise<CONSUMER_REGISTERS>();
    await_predecessor();
    const int g = lane >> 2, group = warp >> 2, quarter = warp & 3;
    Progress at;
    uint32_t number = 0;
    for (Part part; work.next(part); number++) {
        const int n = linear.first_output(part.tile), m = linear.first_row(part.tile);
        const int output = n + group * RT * 64 + quarter * 16 + g;  // this thread's first, of two in every 64
        const float x_step = thread < T && m + thread < rows ? x_steps[m + thread] : 0;
        float w_step[RT][2];
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                w_step[r][i] = output + r * 64 + i * 8 < N ? w_steps[output + r * 64 + i * 8] : 0;
        Sum sum[RT][T / 2];
        multiply(place, part, group, at, sum);

        float* const steps_of_rows = reinterpret_cast<float*>(place.window + X_STEPS) + (number & 1) * T;
        if (thread < T) steps_of_rows[thread] = x_step;
        sync_threads_of(1, CONSUMERS);
        int num_listed = 0;
        if constexpr (!FP8) num_listed = await_codes(place, listed, part, at);
        const Finish finish = {place, linear, work, w_step, y, workspace, n, m, group, quarter};
        const bool is_whole = work.is_whole(part);
        float* const slot = finish.slot_of(grid.block, part.begin == 0);
#pragma unroll
        for (int piece = 0; piece < T; piece += PIECE)
#pragma unroll
            for (int r = 0; r < RT; r++) {
                float value[PIECE / 2];
#pragma unroll
                for (int i = 0; i < PIECE / 2; i++)
                    value[i] = steps_of_rows[piece + i / 4 * 8 + 2 * (lane & 3) + (i & 1)] * float(sum[r][piece / 2 + i]);
                if constexpr (!FP8) add_outliers(place, listed, linear, w, num_listed, r, output, n, at, value);
#pragma unroll
                for (int i = 0; i < PIECE / 8; i++) {
                    const int j = piece / 8 + i;
                    if (is_whole) finish.write(r, j, value + i * 4);
                    else finish.leave(slot, r, j, value + i * 4);
                }
            }
        if (!is_whole && finish.is_last(part.tile, arrived)) {
            constexpr int BATCH = J < 8 ? J : 8;
#pragma unroll
            for (int r = 0; r < RT; r++)
#pragma unroll 1
                for (int j = 0; j < J; j += BATCH) {
                    float total[BATCH][4] = {};
                    finish.add_parts(part.tile, r, j, total);
#pragma unroll
                    for (int i = 0; i < BATCH; i++) finish.write(r, j + i, total[i]);
                }
        }
        sync_warp();
        if (!FP8 && lane == 0) barrier_arrive(here + TAKEN);
    }
}
