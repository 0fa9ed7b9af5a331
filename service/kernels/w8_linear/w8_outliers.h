// Columns with outliers, which are the bits of a bitmap, and the product of what stands in them: which columns a part of a tile
// lists, their codes out of the stages of W, their 16-bit numbers of x, and both into the sums.
//
// A part has a list of its own, ranked by the bits before it; the first CAP codes come from the stages, further ones from
// memory, so that any number is right. An outlier's column is 2 bytes of a sector of 32: where there are many rows, each block
// first gathers some rows' outliers into x_out [rows][x_out_columns] for all, and waits for the others before it reads theirs.
#pragma once
#include "w8_work.h"

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

// All listed columns, in shared memory.
struct Listed {
    uint32_t* bits;
    uint16_t* before;   // set bits of the steps before this one
    uint16_t* columns;  // of each room
    DEVICE explicit Listed(char* window) {
        bits = reinterpret_cast<uint32_t*>(window + BITMAP);
        before = reinterpret_cast<uint16_t*>(window + BEFORE);
        columns = reinterpret_cast<uint16_t*>(window + COLUMNS);
    }
    // Column of a rank: the last step with no more bits before it, there the word, and there the bit.
    DEVICE int column_of(int rank, int steps) const {
        int high = steps, low = 0;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (before[middle] <= rank) low = middle;
            else high = middle;
        }
        int left = rank - before[low], word = low * 4;
        while (left >= ones(bits[word])) left -= ones(bits[word++]);
        uint32_t of_word = bits[word];
        for (; left > 0; left--) of_word &= of_word - 1;
        return word * 32 + lowest(of_word);
    }
    DEVICE int ones_of(int step) const {
        const uint32_t* word = bits + step * 4;
        return ones(word[0]) + ones(word[1]) + ones(word[2]) + ones(word[3]);
    }
    // A warp's work: the bitmap, and the bits before each step.
    DEVICE void read(const uint32_t* bitmap, const Linear& linear, int lane) const {
        const int steps = linear.steps, share = (steps + 31) / 32, begin = lane * share;
        for (int i = lane; i < steps * 4; i += 32) bits[i] = i < (linear.K + 31) / 32 ? bitmap[i] : 0;
        sync_warp();
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
    }
};
// The listed columns of a part: ranks [first, past).
struct Ranks {
    int first, past;
    DEVICE Ranks(const Listed& listed, const Part& part) : first(listed.before[part.begin]), past(listed.before[part.end]) {}
};

// The role of a warp: codes of listed columns out of each stage of W as it passes.
DEVICE void copy_codes(const Place& place, const Listed& listed, Work& work) {
    const int lane = place.lane;
    uint32_t stage = 0, phase = 0, taken = 1;
    for (Part part; work.next(part); taken ^= 1) {
        const int first = listed.before[part.begin], start = first & ~7;
        barrier_wait(place.here + TAKEN, taken);  // the part before this one is over
        for (int step = part.begin; step < part.end; step++) {
            barrier_wait(place.here + FULL + 8 * stage, phase);
            int rank = listed.before[step] - start;
            const int past = listed.before[step + 1] - start < CAP ? listed.before[step + 1] - start : CAP;
            const char* from = place.window + RING + stage * STAGE_BYTES;
            int word = 0;
            uint32_t bits = rank < past ? listed.bits[step * 4] : 0;
            auto next_column = [&]() {
                while (bits == 0) bits = listed.bits[step * 4 + ++word];
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
                    place.window[code_at(lane + i * 32, rank)] = codes[0][i];
                    place.window[code_at(lane + i * 32, rank + has_second)] = codes[1][i];
                }
                rank += 2;
            }
            sync_warp();
            if (lane == 0) barrier_arrive(place.here + EMPTY + 8 * stage);
            advance(stage, phase);
        }
        if (listed.before[part.end] > first && lane == 0) barrier_arrive(place.here + CODED);
    }
}

// 16-bit numbers of x, in memory, and which of them count. The functions are the work of two warps, `index` of 64 threads.
struct Outliers {
    const uint16_t* x16;  // [rows][K]
    uint16_t* x_out;      // [rows][columns], gathered
    int columns;
    float threshold;

    DEVICE uint32_t counted(uint32_t v) const { return float_of(v & 0x7fff) >= threshold ? v : 0; }
    // This block's share of rows: the outliers of all listed columns, side by side.
    DEVICE void gather(const Listed& listed, const Linear& linear, const Grid& grid, int* gathered, int index) const {
        constexpr int BATCH = 8;
        const int rows = linear.rows, block = grid.block, blocks = grid.blocks;
        const int total = listed.before[linear.steps] < columns ? listed.before[linear.steps] : columns;
        for (int i = index; i < total; i += 64) {
            const uint16_t* const from = x16 + listed.column_of(i, linear.steps);
#pragma unroll 1
            for (int begin = block; begin < rows; begin += blocks * BATCH) {
                uint32_t v[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    const int row = begin + j * blocks;
                    v[j] = load_fresh2(from + size_t(row < rows ? row : begin) * linear.K);
                }
#pragma unroll
                for (int j = 0; j < BATCH; j++)
                    if (begin + j * blocks < rows)
                        store_for_others(x_out + size_t(begin + j * blocks) * columns + i, counted(v[j]));
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
    }
    // PIECE rows from m in the columns of ranks [rank, rank + 32), zeros where those are not the part's -> a room.
    DEVICE void fetch(const Place& place, const Listed& listed, const Linear& linear, int index, int room, int rank,
                      const Ranks& ranks, int m) const {
        const int rows = linear.rows, first = ranks.first, past = ranks.past;
        char* const to = place.window + X_OUT + room * ROOM;
        if (index < 32)
            listed.columns[room * 32 + index] =
                uint16_t(rank + index >= first && rank + index < past ? listed.column_of(rank + index, linear.steps) : 0);
        sync_threads_of(2, 64);
        if (GATHERS && rank + 32 <= columns) {
            constexpr int EACH = PIECE * 4 / 64;  // of 16 bytes
            uint4 eight[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int row = m + (index >> 2) + i * 16;
                eight[i] = load_fresh16(x_out + size_t(row < rows ? row : rows - 1) * columns + rank + (index & 3) * 8);
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
            const uint16_t* const low_at = x16 + listed.columns[room * 32 + 2 * pair];
            const uint16_t* const high_at = x16 + listed.columns[room * 32 + 2 * pair + 1];
#pragma unroll 1
            for (int begin = index >> 4; begin < PIECE; begin += 4 * BATCH) {
                uint32_t low[BATCH], high[BATCH];
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const size_t offset = size_t(m + begin + i * 4 < rows ? m + begin + i * 4 : rows - 1) * linear.K;
                    low[i] = load_fresh2(low_at + offset), high[i] = load_fresh2(high_at + offset);
                }
#pragma unroll
                for (int i = 0; i < BATCH; i++) {
                    const int row = begin + i * 4;
                    const uint32_t two = m + row < rows ? (counted(low[i]) | counted(high[i]) << 16) & mask : 0;
                    if (row < PIECE) *reinterpret_cast<uint32_t*>(to + at_slot(row, pair * 4)) = two;
                }
            }
        }
        writes_visible_to_wgmma();
        sync_warp();
        if (place.lane == 0) barrier_arrive(place.here + READY + 8 * room);
    }
};

// The role of two warps: outliers of every part, 32 columns at a time into one of two rooms.
DEVICE void fetch_outliers(const Place& place, const Listed& listed, const Outliers& outliers, const Linear& linear, Work& work,
                           int* gathered) {
    const int index = place.thread - CONSUMERS - 64;
    if (GATHERS && listed.before[linear.steps] > 0) outliers.gather(listed, linear, work.grid, gathered, index);
    uint32_t free = 1, room = 0;
    for (Part part; work.next(part);) {
        const Ranks ranks(listed, part);
        const int start = ranks.first & ~7;  // where a row's gathered numbers are aligned to 16 bytes
        const bool is_alone = ranks.past - start <= LISTED_AT_A_TIME;  // then a room serves all outputs
        if (ranks.past > ranks.first)
            for (int piece = 0; piece < T; piece += PIECE)
                for (int r = 0; r < (is_alone ? 1 : RT); r++)
                    for (int rank = start; rank < ranks.past; rank += LISTED_AT_A_TIME) {
                        barrier_wait(place.here + FREE + 8 * room, free);
                        outliers.fetch(place, listed, linear, index, room, rank, ranks, linear.first_row(part.tile) + piece);
                        advance_room(room, free);
                    }
    }
}

// A consumer waits until a part's codes are copied -> the length of its list.
DEVICE int await_codes(const Place& place, const Listed& listed, const Part& part, Progress& at) {
    barrier_wait(place.here + LISTED, 0);
    const int first = listed.before[part.begin];
    const int past = listed.before[part.end], start = past > first ? first & ~7 : past;
    if (past > first) barrier_wait(place.here + CODED, at.coded), at.coded ^= 1;
    return past - start;
}
// The product of outliers and their columns of W, to a consumer's sums of 64 outputs x PIECE rows: the r-th of its warpgroup.
// The thread's outputs begin with `output`, in a tile from output n on.
DEVICE void add_outliers(const Place& place, const Listed& listed, const Linear& linear, const int8_t* w, int num_listed, int r,
                         int output, int n, Progress& at, float (&value)[PIECE / 2]) {
    const bool is_alone = num_listed <= LISTED_AT_A_TIME;
    const int lane = place.lane;
#pragma unroll 1
    for (int base = 0; base < num_listed; base += LISTED_AT_A_TIME) {
        if (r == 0 || !is_alone) barrier_wait(place.here + READY + 8 * at.room, at.ready);
        uint32_t codes[2][4];
        auto copied = [&](int s, int i) {
            const int row = r * 64 + (i & 1) * 8, column = s * 16 + (i >> 1) * 8 + 2 * (lane & 3);
            return uint32_t(*reinterpret_cast<const uint16_t*>(place.window + code_at(output - n + row, base + column)));
        };
        auto fetched = [&](int s, int i) {
            const int row = r * 64 + (i & 1) * 8, column = s * 16 + (i >> 1) * 8 + 2 * (lane & 3);
            const int8_t* const from = w + size_t(output + row < linear.N ? output + row : 0) * linear.K;
            const uint16_t* const of = listed.columns + at.room * 32 + column;
            return uint8_t(from[of[0]]) | uint32_t(uint8_t(from[of[1]])) << 8;
        };
        if (base < CAP) {
#pragma unroll
            for (int i = 0; i < 8; i++) codes[i / 4][i & 3] = pair_of_codes(copied(i / 4, i & 3));
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) codes[i / 4][i & 3] = pair_of_codes(fetched(i / 4, i & 3));
        }
        const uint64_t outliers = narrow_descriptor(place.here + X_OUT + at.room * ROOM);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < 2; s++) wgmma<PIECE>(value, codes[s], outliers + 2 * s, 1);
        wgmma_commit();
        wgmma_wait<0>();
        settle<PIECE / 2>(value);
        if (r == RT - 1 || !is_alone) {
            if (lane == 0) barrier_arrive(place.here + FREE + 8 * at.room);
            advance_room(at.room, at.ready);
        }
    }
}
