// W8A8 linear of any number of rows: y^T = W x^T, so that R outputs x T rows of activations are a tile; both operands
// go from memory to the tensor cores as they are. LLM.int8() with its outliers in the same pass, or (FP8) e4m3.
//
//   producer (one thread): W [R][128 K] and x [T][128 K] boxes of bytes under the 128-byte swizzle into STAGES stages
//   WGS (two) consumer warpgroups: 64 * RT outputs each; int32 sums, or e4m3 sums that are moved to float32 every 128 of K
//   three warps beside the producer, for outliers: one copies the listed columns' codes out of each stage of W as it
//       passes, two fetch the 16-bit outliers, 32 columns at a time into one of two rooms. After the last stage sums become
//       floats, 64 outputs x up to 128 rows of x at a time, and the product of outliers is added: no second reading of W.
//
// Columns with outliers are the bits of `bitmap`; codes of outliers are 0. A part of a tile (below) has a list of its own,
// ranked by the bits before it; the first CAP codes come from the stages, further ones from memory, so that any number is
// right. An outlier's column is 2 bytes of a sector of 32: where there are many rows, each block first gathers some
// rows' outliers into x_out [rows][x_out_columns] for all, and waits for the others before it reads theirs.
//
// Work: of all tiles the first `stream_tiles` are cut into equal numbers of steps of 128 K, one run a block, wherever
// a tile ends; the others go to the blocks whole, in turn. Who computed a part of a tile leaves it in memory; who comes
// last adds the parts in the order of K, so that the bits do not depend on who that is.
#include "w8_device.h"

#ifndef FP8
#define FP8 0
#endif
#ifndef TILE
#define TILE 64
#endif
#ifndef RT
#define RT 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef CAP  // listed columns of a part that are taken out of the stages
#define CAP 64
#endif
#ifndef PER_SM  // blocks that fit a multiprocessor: with 2, a launch works while the next one already reads its weights
#define PER_SM 1
#endif
// What blocks need of a multiprocessor beside those of other launches, and what they ask for before the predecessor is over:
// docs/experiments.md, section 9, third run
#ifndef WARPGROUPS  // of consumers
#define WARPGROUPS 2
#endif
#ifndef LIGHT  // registers stay as they are dealt out, and FP8's producer is one warp
#define LIGHT 0
#endif
#ifndef AHEAD  // further steps of a block's weights that are brought into the L2
#define AHEAD 0
#endif
#ifndef MAPS  // tensor maps are fetched ahead of their first use
#define MAPS 0
#endif
constexpr int T = TILE, WGS = WARPGROUPS, R = 64 * RT * WGS, CONSUMERS = 128 * WGS, J = T / 8;
constexpr int THREADS = CONSUMERS + (FP8 && LIGHT ? 32 : 128);
constexpr int W_BYTES = R * 128, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int WORDS = FP8 ? 0 : 1024;                  // of the bitmap: up to 32,768 columns
constexpr int PIECE = T < 128 || RT * T < 256 ? T : 64;  // rows of x whose sums become floats at a time
constexpr int LISTED_AT_A_TIME = 32, ROOM = PIECE * LISTED_AT_A_TIME * 2;
constexpr bool GATHERS = !FP8 && T >= 128;
constexpr int OUT_ROWS = 16, OUT_BYTES = OUT_ROWS * 32;  // of results, where a warp turns them
// addresses in shared memory; the first 1024 bytes are the system's
constexpr int FULL = 1024, EMPTY = FULL + 8 * STAGES, READY = FULL + 192, FREE = READY + 16, CODED = READY + 32;
constexpr int TAKEN = READY + 40, LISTED = READY + 48, LAST = READY + 56, COLUMNS = FULL + 256, X_STEPS = FULL + 384, BITMAP = X_STEPS + T * 8;
constexpr int BEFORE = BITMAP + WORDS * 4, CODES = BEFORE + (FP8 ? 0 : WORDS / 2 + 16);
constexpr int X_OUT = (CODES + (FP8 ? 0 : R * CAP) + 1023) / 1024 * 1024, OUT = X_OUT + (FP8 ? 0 : 2 * ROOM);
constexpr int RING = (OUT + WGS * 4 * OUT_BYTES + 1023) / 1024 * 1024;
constexpr int END = RING + STAGES * STAGE_BYTES;
static_assert(END * PER_SM <= 228 * 1024 && STAGES <= 12 && CAP % LISTED_AT_A_TIME == 0 && T <= CONSUMERS);
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END - 1024);  // what the host asks for
#endif
constexpr bool MOVES_REGISTERS = PER_SM == 1 && !LIGHT;
constexpr int CONSUMER_REGISTERS = RT * T < 256 ? 216 : 224, PRODUCER_REGISTERS = RT * T < 256 ? 72 : 56;

#if FP8
using Sum = float;
#else
using Sum = int;
#endif
struct Run {  // steps [begin, end) of a tile
    int tile, begin, end;
};

DEVICE int at_slot(int row, int byte) {  // of a room [PIECE][32] of outliers, swizzled
    const int at = row * (LISTED_AT_A_TIME * 2) + byte;
    return at ^ (at >> 7 & 3) << 4;
}
DEVICE int code_at(int row, int column) {  // of CODES [R][CAP]: a column of 32 rows meets every bank, pairs stay together
    constexpr int SHARE = CAP < 128 ? 128 / CAP : 1, MOST = CAP < 128 ? CAP / 4 - 1 : 31;  // rows a set of 32 banks
    return CODES + row * CAP + (column ^ (row / SHARE & MOST) << 2);
}
DEVICE uint32_t pair_of_codes(uint32_t two) {  // the lower two bytes, exactly
#if BF16
    const uint32_t both = permute(two, 0x43434343, 0x4140);  // of 128 + the lower seven bits, 128 + the upper one is taken
    return subtract(both & 0xff7fff7f, both & 0xff80ff80);
#else
    return subtract(permute(two ^ 0x8080, 0x64646464, 0x4140), 0x64806480);  // 1024 + 128 + code, less 1152
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
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int steps = (K + 127) / 128, row_tiles = (rows + T - 1) / T, tiles = (N + R - 1) / R * row_tiles;
    const int block = blockIdx.x, blocks = gridDim.x, stream = stream_tiles * steps;
    uint32_t* const bits_of = reinterpret_cast<uint32_t*>(window + BITMAP);
    uint16_t* const before = reinterpret_cast<uint16_t*>(window + BEFORE);  // set bits of the steps before this one
    uint16_t* const columns = reinterpret_cast<uint16_t*>(window + COLUMNS);  // of each room

    if (thread == 0) {
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
    if (MAPS && thread == CONSUMERS) prefetch_map(&w_map), prefetch_map(&x_map);
    sync_block();

    // Every role walks over the block's parts by itself, in the same order.
    int at = block * stream / blocks, whole = stream_tiles + block;
    const int stop_at = (block + 1) * stream / blocks;
    auto next = [&](Run& part) {
        if (at < stop_at) {
            part.tile = at / steps, part.begin = at - part.tile * steps;
            part.end = part.begin + stop_at - at < steps ? part.begin + stop_at - at : steps;
            at += part.end - part.begin;
        } else if (whole < tiles) {
            part.tile = whole, part.begin = 0, part.end = steps, whole += blocks;
        } else
            return false;
        return true;
    };
    // Column of a rank: the last step with no more bits before it, there the word, and there the bit.
    auto column_of = [&](int rank) {
        int low = 0, high = steps;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (before[middle] <= rank) low = middle;
            else high = middle;
        }
        int left = rank - before[low], word = low * 4;
        while (left >= ones(bits_of[word])) left -= ones(bits_of[word++]);
        uint32_t bits = bits_of[word];
        for (; left > 0; left--) bits &= bits - 1;
        return word * 32 + lowest(bits);
    };
    auto outlier = [&](uint32_t v) { return float_of(v & 0x7fff) >= threshold ? v : 0; };
    // This block's share of rows: the outliers of all listed columns, side by side. `index` of 64 threads.
    auto gather = [&](int index) {
        constexpr int BATCH = 8;
        const int total = before[steps] < x_out_columns ? before[steps] : x_out_columns;
        for (int i = index; i < total; i += 64) {
            const uint16_t* const from = x16 + column_of(i);
#pragma unroll 1
            for (int begin = block; begin < rows; begin += blocks * BATCH) {
                uint32_t v[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const int row = begin + j * blocks;
                    v[j] = load_fresh2(from + size_t(row < rows ? row : begin) * K);
                }
#pragma unroll
                for (int j = 0; j < BATCH; j++)
                    if (begin + j * blocks < rows)
                        store_for_others(x_out + size_t(begin + j * blocks) * x_out_columns + i, outlier(v[j]));
            }
        }
        fence_device();
        sync_threads_of(2, 64);
        if (index == 0) {
            count_arrival(gathered);
            flag_await(reinterpret_cast<const uint32_t*>(gathered), blocks);
            if (count_arrival(gathered + 1) == blocks - 1) gathered[0] = gathered[1] = 0;  // all have seen it
        }
        sync_threads_of(2, 64);
    };
    // Outliers of PIECE rows from m in the columns of ranks [rank, rank + 32), those in [first, past) -> a room.
    auto fetch_outliers = [&](int index, int room, int rank, int first, int past, int m) {
        char* const to = window + X_OUT + room * ROOM;
        if (index < 32) columns[room * 32 + index] = uint16_t(rank + index >= first && rank + index < past ? column_of(rank + index) : 0);
        sync_threads_of(2, 64);
        if (GATHERS && rank + 32 <= x_out_columns) {
            constexpr int EACH = PIECE * 4 / 64;  // of 16 bytes
            uint4 eight[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int row = m + (index >> 2) + i * 16;
                eight[i] = load_fresh16(x_out + size_t(row < rows ? row : rows - 1) * x_out_columns + rank + (index & 3) * 8);
            }
            uint32_t mask[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int of = rank + (index & 3) * 8 + 2 * j;
                mask[j] = (of >= first && of < past ? 0xffff : 0) | (of + 1 >= first && of + 1 < past ? 0xffff0000 : 0);
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int row = (index >> 2) + i * 16;
                const uint32_t is_there = m + row < rows ? ~0u : 0;
                *reinterpret_cast<uint4*>(to + at_slot(row, (index & 3) * 16)) = {
                    eight[i].x & mask[0] & is_there, eight[i].y & mask[1] & is_there, eight[i].z & mask[2] & is_there,
                    eight[i].w & mask[3] & is_there};
            }
        } else {
            constexpr int BATCH = 8;  // a thread has two columns; its loads are under way before the first is looked at
            const int pair = index & 15, of = rank + 2 * pair;
            const uint32_t mask = (of >= first && of < past ? 0xffff : 0) | (of + 1 >= first && of + 1 < past ? 0xffff0000 : 0);
            const uint16_t* const low_at = x16 + columns[room * 32 + 2 * pair];
            const uint16_t* const high_at = x16 + columns[room * 32 + 2 * pair + 1];
#pragma unroll 1
            for (int begin = index >> 4; begin < PIECE; begin += 4 * BATCH) {
                uint32_t low[BATCH], high[BATCH];
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const size_t offset = size_t(m + begin + i * 4 < rows ? m + begin + i * 4 : rows - 1) * K;
                    low[i] = load_fresh2(low_at + offset), high[i] = load_fresh2(high_at + offset);
                }
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const int row = begin + i * 4;
                    const uint32_t two = m + row < rows ? (outlier(low[i]) | outlier(high[i]) << 16) & mask : 0;
                    if (row < PIECE) *reinterpret_cast<uint32_t*>(to + at_slot(row, pair * 4)) = two;
                }
            }
        }
        writes_visible_to_wgmma();
        sync_warp();
        if (lane == 0) barrier_arrive(here + READY + 8 * room);
    };

    if (warp >= WGS * 4) {
        if constexpr (MOVES_REGISTERS) registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) {
            const uint64_t policy = row_tiles == 1 ? READ_ONCE : NORMAL;
            Run part = {};
            auto fetch_weights = [&](int stage, int step) {
                barrier_expect(here + FULL + 8 * stage, STAGE_BYTES);
                copy_box(here + RING + stage * STAGE_BYTES, &w_map, step * 128, part.tile / row_tiles * R, here + FULL + 8 * stage, policy);
            };
            // No kernel writes weights: the first stages' are fetched while the predecessor still works.
            const int first_at = at, first_whole = whole;
            int early = 0;
            if constexpr (AHEAD == 0) {
                while (early < STAGES && next(part))
                    for (int step = part.begin; step < part.end && early < STAGES; step++) fetch_weights(early++, step);
            } else {
                while (early < STAGES + AHEAD && next(part))
                    for (int step = part.begin; step < part.end && early < STAGES + AHEAD; step++, early++)
                        if (early < STAGES) fetch_weights(early, step);
                        else prefetch_box(&w_map, step * 128, part.tile / row_tiles * R);
                if (early > STAGES) early = STAGES;
            }
            at = first_at, whole = first_whole;
            await_predecessor();
            release_successor();
            uint32_t stage = 0, phase = 0;
            while (next(part)) {
#pragma unroll 1
                for (int step = part.begin; step < part.end; step++) {
                    if (early > 0) early--;
                    else {
                        barrier_wait(here + EMPTY + 8 * stage, phase ^ 1);
                        fetch_weights(stage, step);
                    }
                    copy_box(here + RING + stage * STAGE_BYTES + W_BYTES, &x_map, step * 128, part.tile % row_tiles * T,
                             here + FULL + 8 * stage, KEEP);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
            }
        } else if (!FP8 && warp > WGS * 4) {
            await_predecessor();
            const bool copies_codes = warp == WGS * 4 + 1;
            if (copies_codes) {
                const int share = (steps + 31) / 32, begin = lane * share;
                for (int i = lane; i < steps * 4; i += 32) bits_of[i] = i < (K + 31) / 32 ? bitmap[i] : 0;
                sync_warp();
                auto ones_of = [&](int step) {
                    const uint32_t* word = bits_of + step * 4;
                    return ones(word[0]) + ones(word[1]) + ones(word[2]) + ones(word[3]);
                };
                uint32_t mine = 0;
                for (int i = begin; i < begin + share && i < steps; i++) mine += ones_of(i);
                uint32_t sum = mine;
                for (int distance = 1; distance < 32; distance *= 2) {
                    const uint32_t other = shuffle_up(sum, distance);
                    if (lane >= distance) sum += other;
                }
                if (lane == 31) before[steps] = uint16_t(sum);
                sum -= mine;
                for (int i = begin; i < begin + share && i < steps; i++) before[i] = uint16_t(sum), sum += ones_of(i);
                sync_warp();
                if (lane == 0) barrier_arrive(here + LISTED);
            }
            barrier_wait(here + LISTED, 0);
            if (copies_codes) {
                uint32_t stage = 0, phase = 0, taken = 1;
                for (Run part; next(part); taken ^= 1) {
                    const int first = before[part.begin], start = first & ~7;
                    barrier_wait(here + TAKEN, taken);  // the part before this one is over
                    for (int step = part.begin; step < part.end; step++) {
                        barrier_wait(here + FULL + 8 * stage, phase);
                        int rank = before[step] - start;
                        const int past = before[step + 1] - start < CAP ? before[step + 1] - start : CAP;
                        const char* from = window + RING + stage * STAGE_BYTES;
                        int word = 0;
                        uint32_t bits = rank < past ? bits_of[step * 4] : 0;
                        auto next_column = [&]() {
                            while (bits == 0) bits = bits_of[step * 4 + ++word];
                            const int column = word * 32 + lowest(bits);
                            bits &= bits - 1;
                            return column;
                        };
                        while (rank < past) {  // two at a time, the last one twice if it is alone
                            const int column = next_column(), has_second = rank + 1 < past, second = has_second ? next_column() : column;
                            char codes[2][R / 32];
#pragma unroll
                            for (int i = 0; i < R / 32; i++) {
                                const int row = lane + i * 32;
                                codes[0][i] = from[row * 128 + (column ^ (row & 7) << 4)];
                                codes[1][i] = from[row * 128 + (second ^ (row & 7) << 4)];
                            }
#pragma unroll
                            for (int i = 0; i < R / 32; i++) {
                                window[code_at(lane + i * 32, rank)] = codes[0][i];
                                window[code_at(lane + i * 32, rank + has_second)] = codes[1][i];
                            }
                            rank += 2;
                        }
                        sync_warp();
                        if (lane == 0) barrier_arrive(here + EMPTY + 8 * stage);
                        if (++stage == STAGES) stage = 0, phase ^= 1;
                    }
                    if (before[part.end] > first && lane == 0) barrier_arrive(here + CODED);
                }
            } else {
                const int index = thread - CONSUMERS - 64;
                if (GATHERS && before[steps] > 0) gather(index);
                uint32_t room = 0, free = 1;
                for (Run part; next(part);) {
                    const int first = before[part.begin], past = before[part.end], start = first & ~7;
                    const bool is_alone = past - start <= LISTED_AT_A_TIME;  // then a room serves all outputs
                    if (past > first)
                        for (int piece = 0; piece < T; piece += PIECE)
                            for (int r = 0; r < (is_alone ? 1 : RT); r++)
                                for (int rank = start; rank < past; rank += LISTED_AT_A_TIME) {
                                    barrier_wait(here + FREE + 8 * room, free);
                                    fetch_outliers(index, room, rank, first, past, part.tile % row_tiles * T + piece);
                                    room ^= 1, free ^= room == 0;
                                }
                }
            }
        }
    } else {
        if constexpr (MOVES_REGISTERS) registers_raise<CONSUMER_REGISTERS>();
        await_predecessor();
        const int g = lane >> 2, group = warp >> 2, quarter = warp & 3;
        uint32_t stage = 0, phase = 0, done = 0, room = 0, ready = 0, coded = 0, number = 0;  // `done`: the stage given back next
        auto give_back = [&]() {
            if (lane == 0) barrier_arrive(here + EMPTY + 8 * done);
            if (++done == STAGES) done = 0;
        };
        for (Run part; next(part); number++) {
            const int n = part.tile / row_tiles * R, m = part.tile % row_tiles * T;
            const int first_row = n + group * RT * 64 + quarter * 16 + g;  // this thread's, and every eighth in a tile
            const float x_step = thread < T && m + thread < rows ? x_steps[m + thread] : 0;
            float w_step[RT][2];
#pragma unroll
            for (int r = 0; r < RT; r++)
#pragma unroll
                for (int i = 0; i < 2; i++)
                    w_step[r][i] = first_row + r * 64 + i * 8 < N ? w_steps[first_row + r * 64 + i * 8] : 0;

            auto a_at = [&](int r) { return descriptor(here + RING + stage * STAGE_BYTES + (group * RT + r) * 8192); };
            auto b_at = [&]() { return descriptor(here + RING + stage * STAGE_BYTES + W_BYTES); };
            Sum sum[RT][T / 2];
#if FP8
            float few[T / 2];  // the tensor cores keep 14 bits of a sum: 128 of K at a time
#pragma unroll
            for (int r = 0; r < RT; r++)
#pragma unroll
                for (int i = 0; i < T / 2; i++) sum[r][i] = 0;
            for (int step = part.begin; step < part.end; step++) {
                barrier_wait(here + FULL + 8 * stage, phase);
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
                if (++stage == STAGES) stage = 0, phase ^= 1;
            }
#else
            for (int step = part.begin; step < part.end; step++) {
                barrier_wait(here + FULL + 8 * stage, phase);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < 4; s++)
#pragma unroll
                    for (int r = 0; r < RT; r++)
                        wgmma_codes<T>(sum[r], a_at(r) + 2 * s, b_at() + 2 * s, step > part.begin || s > 0);
                wgmma_commit();
                if (++stage == STAGES) stage = 0, phase ^= 1;
                wgmma_wait<1>();
                if (step > part.begin) give_back();
            }
            wgmma_wait<0>();
#pragma unroll
            for (int r = 0; r < RT; r++) settle<T / 2>(sum[r]);
            give_back();
#endif

            float* const steps_of_rows = reinterpret_cast<float*>(window + X_STEPS) + (number & 1) * T;
            if (thread < T) steps_of_rows[thread] = x_step;
            sync_threads_of(1, CONSUMERS);
            int start = 0, past = 0;  // ranks of this part's listed columns
            if constexpr (!FP8) {
                barrier_wait(here + LISTED, 0);
                const int first = before[part.begin];
                past = before[part.end], start = past > first ? first & ~7 : past;
                if (past > first) barrier_wait(here + CODED, coded), coded ^= 1;
            }
            const bool is_alone = past - start <= LISTED_AT_A_TIME;
            // 16 outputs x 8 rows of activations -> a warp's room, turned there; 16 rows of 32 bytes at a time -> y.
            auto write = [&](int r, int j, const float* v) {
                const uint32_t out = OUT + warp * OUT_BYTES;
                const int to = j * 8 % OUT_ROWS + (lane & 7), column = n + (group * RT + r) * 64 + quarter * 16;
                store_two_transposed(here + out + to * 32 + (((lane >> 3) ^ (to >> 2)) & 1) * 16,
                                     to_pair(v[0] * w_step[r][0], v[1] * w_step[r][0]),
                                     to_pair(v[2] * w_step[r][1], v[3] * w_step[r][1]));
                if ((j + 1) * 8 % OUT_ROWS) return;
                sync_warp();
                const int row = lane >> 1, half = lane & 1, into = m + (j + 1) * 8 - OUT_ROWS + row;
                const uint4 eight = *reinterpret_cast<const uint4*>(window + out + row * 32 + ((half ^ (row >> 2)) & 1) * 16);
                if (into < rows && column + half * 8 < N)
                    *reinterpret_cast<uint4*>(y + (size_t(into) * N + column + half * 8) * 2) = eight;
                sync_warp();
            };

            const bool is_whole = part.begin == 0 && part.end == steps;
            float* const slot = workspace + (size_t(2 * block + (part.begin == 0)) * (R * T / 4) + thread) * 4;
#pragma unroll
            for (int piece = 0; piece < T; piece += PIECE)
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    float value[PIECE / 2];
#pragma unroll
                    for (int i = 0; i < PIECE / 2; i++)
                        value[i] = steps_of_rows[piece + i / 4 * 8 + 2 * (lane & 3) + (i & 1)] * float(sum[r][piece / 2 + i]);
                    if constexpr (!FP8) {
#pragma unroll 1
                        for (int base = 0; base < past - start; base += LISTED_AT_A_TIME) {
                            if (r == 0 || !is_alone) barrier_wait(here + READY + 8 * room, ready);
                            uint32_t codes[2][4];
                            auto copied = [&](int s, int i) {
                                const int row = r * 64 + (i & 1) * 8, column = s * 16 + (i >> 1) * 8 + 2 * (lane & 3);
                                return uint32_t(*reinterpret_cast<const uint16_t*>(window + code_at(first_row - n + row, base + column)));
                            };
                            auto fetched = [&](int s, int i) {
                                const int row = r * 64 + (i & 1) * 8, column = s * 16 + (i >> 1) * 8 + 2 * (lane & 3);
                                const int8_t* const from = w + size_t(first_row + row < N ? first_row + row : 0) * K;
                                const uint16_t* const of = columns + room * 32 + column;
                                return uint8_t(from[of[0]]) | uint32_t(uint8_t(from[of[1]])) << 8;
                            };
                            if (base < CAP) {
#pragma unroll
                                for (int i = 0; i < 8; i++) codes[i / 4][i & 3] = pair_of_codes(copied(i / 4, i & 3));
                            } else {
#pragma unroll
                                for (int i = 0; i < 8; i++) codes[i / 4][i & 3] = pair_of_codes(fetched(i / 4, i & 3));
                            }
                            const uint64_t outliers = narrow_descriptor(here + X_OUT + room * ROOM);
                            wgmma_fence();
#pragma unroll
                            for (int s = 0; s < 2; s++) wgmma<PIECE>(value, codes[s], outliers + 2 * s, 1);
                            wgmma_commit();
                            wgmma_wait<0>();
                            settle<PIECE / 2>(value);
                            if (r == RT - 1 || !is_alone) {
                                if (lane == 0) barrier_arrive(here + FREE + 8 * room);
                                room ^= 1, ready ^= room == 0;
                            }
                        }
                    }
#pragma unroll
                    for (int i = 0; i < PIECE / 8; i++) {
                        const int j = piece / 8 + i;
                        const float* v = value + i * 4;
                        if (is_whole) write(r, j, v);
                        else store_partial(slot + (r * J + j) * CONSUMERS * 4, make_float4(v[0], v[1], v[2], v[3]));
                    }
                }

            if (!is_whole) {
                fence_device();
                sync_threads_of(1, CONSUMERS);
                const int first_step = part.tile * steps;
                const int from = ((first_step + 1) * blocks - 1) / stream, to = ((first_step + steps) * blocks - 1) / stream;
                int* const last = reinterpret_cast<int*>(window + LAST);
                if (thread == 0) {
                    *last = count_arrival(arrived + part.tile) == to - from;
                    if (*last) arrived[part.tile] = 0;
                    fence_device();
                }
                sync_threads_of(1, CONSUMERS);
                if (*last) {
                    constexpr int BATCH = J < 8 ? J : 8;
#pragma unroll
                    for (int r = 0; r < RT; r++)
#pragma unroll 1
                        for (int j = 0; j < J; j += BATCH) {
                            float total[BATCH][4] = {};
#pragma unroll 1
                            for (int other = from; other <= to; other++) {
                                const float* theirs = workspace + (size_t(2 * other + (other == from)) * (R * T / 4) + thread) * 4;
                                float4 four[BATCH];
#pragma unroll
                                for (int i = 0; i < BATCH; i++) four[i] = load_partial(theirs + (r * J + j + i) * CONSUMERS * 4, true);
#pragma unroll
                                for (int i = 0; i < BATCH; i++)
                                    total[i][0] += four[i].x, total[i][1] += four[i].y, total[i][2] += four[i].z, total[i][3] += four[i].w;
                            }
#pragma unroll
                            for (int i = 0; i < BATCH; i++) write(r, j + i, total[i]);
                        }
                }
            }
            sync_warp();
            if (!FP8 && lane == 0) barrier_arrive(here + TAKEN);
        }
    }
}
