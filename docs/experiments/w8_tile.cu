// W8A8 linear of any number of rows: y^T = W x^T, so that R outputs x T rows of activations are a tile; both operands
// go from memory to the tensor cores as they are. LLM.int8() with its outliers in the same pass, or (FP8) e4m3.
//
//   producer (one thread): W [R][128 K] and x [T][128 K] boxes of bytes under the 128-byte swizzle into STAGES stages
//   two consumer warpgroups: 64 * RT outputs each; int32 sums, or e4m3 sums that are moved to float32 every 128 of K
//   three warps beside the producer, for outliers: one copies the listed columns' codes out of each stage of W as it
//       passes, two fetch the 16-bit outliers of these columns. Their product is made after the last stage, 64 rows at
//       a time, and added to the sums as they leave: no second set of sums, no second reading of W.
//
// Columns with outliers are the bits of `bitmap`; codes of outliers are 0. A part of a tile (below) has a list of its own,
// ranked by the bits before it; the first CAP come from the stages, further ones from memory, so that any number is right.
//
// Work: of all tiles the first `stream_tiles` are cut into equal numbers of steps of 128 K, one run a block, wherever
// a tile ends; the others go to the blocks whole, in turn. Who computed a part of a tile leaves it in memory; who comes
// last adds the parts in the order of K, so that the bits do not depend on who that is. Nobody waits for another block.
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
#ifndef SLOTS  // listed columns that are multiplied at a time: 32 or 64
#define SLOTS 32
#endif
constexpr int T = TILE, WGS = 2, R = 64 * RT * WGS, CONSUMERS = 128 * WGS, THREADS = CONSUMERS + 128, J = T / 8;
constexpr int W_BYTES = R * 128, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int WORDS = FP8 ? 0 : 1024;                  // of the bitmap: up to 32,768 columns
constexpr int PIECE = T < 64 ? T : 64;                  // rows of x whose outliers are multiplied at a time
constexpr int OUT_ROWS = 16, OUT_BYTES = OUT_ROWS * 32;
constexpr int CODE_STRIDE = CAP + 4;                   // an odd number of words: a column's store meets every bank
// addresses in shared memory; the first 1024 bytes are the system's
constexpr int FULL = 1024, EMPTY = FULL + 8 * STAGES, READY = FULL + 192, TAKEN = READY + 8, LISTED = READY + 16;
constexpr int LAST = READY + 24, COLUMNS = FULL + 256, X_STEPS = FULL + 512, BITMAP = X_STEPS + 2048;
constexpr int BEFORE = BITMAP + WORDS * 4, CODES = BEFORE + (FP8 ? 0 : WORDS / 2 + 16);
constexpr int X_OUT = (CODES + (FP8 ? 0 : R * CODE_STRIDE) + 1023) / 1024 * 1024;
constexpr int OUT = X_OUT + (FP8 ? 0 : T * SLOTS * 2), RING = (OUT + WGS * 4 * OUT_BYTES + 1023) / 1024 * 1024;
constexpr int END = RING + STAGES * STAGE_BYTES;
static_assert(END <= 232448 + 1024 && STAGES <= 12 && CAP % SLOTS == 0 && T <= CONSUMERS);
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END - 1024);  // what the host asks for
#endif
constexpr int CONSUMER_REGISTERS = RT * T < 256 ? 216 : 224, PRODUCER_REGISTERS = RT * T < 256 ? 72 : 56;

#if FP8
using Sum = float;
#else
using Sum = int;
#endif
struct Run {  // steps [begin, end) of a tile
    int tile, begin, end;
};

DEVICE uint32_t at_slot(int row, int byte) {  // of X_OUT, swizzled
    const uint32_t at = row * (SLOTS * 2) + byte;
    return X_OUT + (at ^ ((at >> 7 & (SLOTS == 64 ? 7 : 3)) << 4));
}
DEVICE uint32_t halves_of_codes(int low, int high) { return half_pair(float(int8_t(low)), float(int8_t(high))); }

KERNEL __launch_bounds__(THREADS, 1)
w8_tile(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap w_map,
        // what the predecessor wrote is not __restrict__: such a load may be moved to before the wait for it
        const float* x_steps, const float* __restrict__ w_steps, const uint16_t* x16, const uint32_t* bitmap,
        const int8_t* __restrict__ w, char* y, float4* workspace, int* arrived, int rows, int N, int K, int stream_tiles,
        float threshold) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int steps = (K + 127) / 128, row_tiles = (rows + T - 1) / T, tiles = (N + R - 1) / R * row_tiles;
    const int block = blockIdx.x, blocks = gridDim.x, stream = stream_tiles * steps;
    uint32_t* const bits_of = reinterpret_cast<uint32_t*>(window + BITMAP);
    uint16_t* const before = reinterpret_cast<uint16_t*>(window + BEFORE);  // set bits of the steps before this one
    uint16_t* const columns = reinterpret_cast<uint16_t*>(window + COLUMNS);

    if (thread == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(here + FULL + 8 * i, 1);
            barrier_init(here + EMPTY + 8 * i, WGS * 4 + !FP8);
        }
        barrier_init(here + READY, 3);
        barrier_init(here + TAKEN, WGS * 4);
        barrier_init(here + LISTED, 1);
        barriers_visible();
    }
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
    // Outliers in `number` rows, of the `count` columns from rank `first` -> X_OUT [T][SLOTS], zeros where there is none.
    auto fetch_outliers = [&](int index, int threads, int barrier, int first, int count, int m, int first_row, int number) {
        for (int i = index; i < SLOTS; i += threads) columns[i] = uint16_t(i < count ? column_of(first + i) : 0);
        sync_threads_of(barrier, threads);
        constexpr int BATCH = 8;
        const int shift = SLOTS == 64 && count > 32 ? 5 : 4;  // pairs of columns: of 64, or of the 32 that are multiplied
        auto outlier = [&](int row, int i) -> uint32_t {
            const bool is_there = row < number && i < count && m + first_row + row < rows;
            const uint32_t v = x16[is_there ? size_t(m + first_row + row) * K + columns[i] : 0];
            return is_there && to_float(uint16_t(v & 0x7fff)) >= threshold ? v : 0;
        };
#pragma unroll 1
        for (int i = index; i < number << shift; i += threads * BATCH) {
            uint32_t low[BATCH], high[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int row = (i + j * threads) >> shift, pair = (i + j * threads) & ((1 << shift) - 1);
                low[j] = outlier(row, 2 * pair), high[j] = outlier(row, 2 * pair + 1);
            }
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const int row = (i + j * threads) >> shift, pair = (i + j * threads) & ((1 << shift) - 1);
                if (row < number) *reinterpret_cast<uint32_t*>(window + at_slot(first_row + row, pair * 4)) = low[j] | high[j] << 16;
            }
        }
        writes_visible_to_wgmma();
    };

    if (warp >= WGS * 4) {
        registers_lower<PRODUCER_REGISTERS>();
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
            while (early < STAGES && next(part))
                for (int step = part.begin; step < part.end && early < STAGES; step++) fetch_weights(early++, step);
            at = first_at, whole = first_whole;
            wait_for_predecessor();
            launch_successor();
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
            wait_for_predecessor();
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
            uint32_t stage = 0, phase = 0, taken = 1;
            for (Run part; next(part); taken ^= 1) {
                const int first = before[part.begin], count = before[part.end] - first;
                barrier_wait(here + TAKEN, taken);  // the part before this one is over
                if (!copies_codes) {
                    if (count > 0)
                        fetch_outliers(thread - CONSUMERS - 64, 64, 2, first, count < SLOTS ? count : SLOTS,
                                       part.tile % row_tiles * T, 0, T);
                } else
                    for (int step = part.begin; step < part.end; step++) {
                        barrier_wait(here + FULL + 8 * stage, phase);
                        int rank = before[step] - first;
                        const int past = before[step + 1] - first < CAP ? before[step + 1] - first : CAP;
                        const char* from = window + RING + stage * STAGE_BYTES;
                        for (int word = 0; rank < past; word++)
                            for (uint32_t bits = bits_of[step * 4 + word]; bits && rank < past; bits &= bits - 1, rank++) {
                                const int column = word * 32 + lowest(bits);
#pragma unroll
                                for (int row = lane; row < R; row += 32)
                                    window[CODES + row * CODE_STRIDE + rank] = from[row * 128 + (column ^ (row & 7) << 4)];
                            }
                        sync_warp();
                        if (lane == 0) barrier_arrive(here + EMPTY + 8 * stage);
                        if (++stage == STAGES) stage = 0, phase ^= 1;
                    }
                sync_warp();
                if (count > 0 && lane == 0) barrier_arrive(here + READY);
            }
        }
    } else {
        registers_raise<CONSUMER_REGISTERS>();
        wait_for_predecessor();
        const int g = lane >> 2, group = warp >> 2, quarter = warp & 3;
        uint32_t stage = 0, phase = 0, done = 0, ready = 0, number = 0;  // `done`: the stage given back next
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

            float* const steps_of_rows = reinterpret_cast<float*>(window + X_STEPS) + (number & 1) * 256;
            if (thread < T) steps_of_rows[thread] = x_step;
            sync_threads_of(1, CONSUMERS);
            int first = 0, count = 0;  // listed columns of this part
            if constexpr (!FP8) {
                barrier_wait(here + LISTED, 0);
                first = before[part.begin], count = before[part.end] - first;
                if (count > 0) barrier_wait(here + READY, ready), ready ^= 1;
            }
            // Codes of a row's two listed columns as halves.
            auto codes_at = [&](int row, int base, int column) -> uint32_t {
                if (base < CAP) {
                    const int pair = *reinterpret_cast<const uint16_t*>(window + CODES + (row - n) * CODE_STRIDE + base + column);
                    return halves_of_codes(pair, pair >> 8);
                }
                if (row >= N) return 0;
                return halves_of_codes(w[size_t(row) * K + columns[column]], w[size_t(row) * K + columns[column + 1]]);
            };
            // 16 outputs x 8 rows of activations -> a warp's room, turned there; 16 rows of 32 bytes at a time -> y.
            const uint32_t out = OUT + warp * OUT_BYTES;
            auto write = [&](int r, int j, const float* v) {
                const int to = j * 8 % OUT_ROWS + (lane & 7), column = n + (group * RT + r) * 64 + quarter * 16;
                store_two_transposed(here + out + to * 32 + (((lane >> 3) ^ (to >> 2)) & 1) * 16,
                                     half_pair(v[0] * w_step[r][0], v[1] * w_step[r][0]),
                                     half_pair(v[2] * w_step[r][1], v[3] * w_step[r][1]));
                if ((j + 1) * 8 % OUT_ROWS) return;
                sync_warp();
                const int row = lane >> 1, half = lane & 1, into = m + (j + 1) * 8 - OUT_ROWS + row;
                const uint4 eight = *reinterpret_cast<const uint4*>(window + out + row * 32 + ((half ^ (row >> 2)) & 1) * 16);
                if (into < rows && column + half * 8 < N)
                    *reinterpret_cast<uint4*>(y + (size_t(into) * N + column + half * 8) * 2) = eight;
                sync_warp();
            };

            const bool is_whole = part.begin == 0 && part.end == steps;
            float4* const slot = workspace + size_t(2 * block + (part.begin == 0)) * (R * T / 4) + thread;
#pragma unroll
            for (int piece = 0; piece < T / PIECE; piece++)
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    float v[PIECE / 2];
#pragma unroll
                    for (int i = 0; i < PIECE / 2; i++) v[i] = 0;
                    if constexpr (!FP8)
#pragma unroll 1
                        for (int base = 0; base < count; base += SLOTS) {
                            if (count > SLOTS && (base > 0 || piece > 0 || r > 0)) {  // what is there is of other columns or rows
                                sync_threads_of(1, CONSUMERS);
                                fetch_outliers(thread, CONSUMERS, 1, first + base, count - base < SLOTS ? count - base : SLOTS, m,
                                               piece * PIECE, PIECE);
                                sync_threads_of(1, CONSUMERS);
                            }
                            const uint32_t place = here + X_OUT + piece * PIECE * SLOTS * 2;
                            const uint64_t outliers = SLOTS == 64 ? descriptor(place) : narrow_descriptor(place);
#pragma unroll 1
                            for (int slots = 0; slots < SLOTS && base + slots < count; slots += 32) {
                                uint32_t codes[2][4];
#pragma unroll
                                for (int s = 0; s < 2; s++)
#pragma unroll
                                    for (int i = 0; i < 4; i++)
                                        codes[s][i] = codes_at(first_row + r * 64 + (i & 1) * 8, base,
                                                               slots + s * 16 + (i >> 1) * 8 + 2 * (lane & 3));
                                wgmma_fence();
#pragma unroll
                                for (int s = 0; s < 2; s++) wgmma<PIECE>(v, codes[s], outliers + slots / 8 + 2 * s, 1);
                                wgmma_commit();
                                wgmma_wait<0>();
                                settle<PIECE / 2>(v);
                            }
                        }
#pragma unroll
                    for (int i = 0; i < PIECE / 8; i++) {
                        const int j = piece * (PIECE / 8) + i;
                        const Sum* of = sum[r] + j * 4;
                        const float even = steps_of_rows[j * 8 + 2 * (lane & 3)], odd = steps_of_rows[j * 8 + 2 * (lane & 3) + 1];
                        float four[4] = {v[i * 4] + even * float(of[0]), v[i * 4 + 1] + odd * float(of[1]),
                                         v[i * 4 + 2] + even * float(of[2]), v[i * 4 + 3] + odd * float(of[3])};
                        if (is_whole) write(r, j, four);
                        else store_global(slot + (r * J + j) * CONSUMERS, make_float4(four[0], four[1], four[2], four[3]));
                    }
                }

            if (!is_whole) {
                fence_gpu();
                sync_threads_of(1, CONSUMERS);
                const int first_step = part.tile * steps;
                const int from = ((first_step + 1) * blocks - 1) / stream, to = ((first_step + steps) * blocks - 1) / stream;
                int* const last = reinterpret_cast<int*>(window + LAST);
                if (thread == 0) {
                    *last = count_arrival(arrived + part.tile) == to - from;
                    if (*last) arrived[part.tile] = 0;
                    fence_gpu();
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
                                const float4* theirs = workspace + size_t(2 * other + (other == from)) * (R * T / 4) + thread;
                                float4 four[BATCH];
#pragma unroll
                                for (int i = 0; i < BATCH; i++) four[i] = load_shared_by_blocks(theirs + (r * J + j + i) * CONSUMERS);
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
