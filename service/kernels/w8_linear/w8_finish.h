// From sums to y: a tile's numbers are turned and written; of a tile that several blocks share each leaves its part in memory,
// and who comes last adds the parts in the order of K, so that the bits do not depend on who that is.
#pragma once
#include "w8_work.h"

// A consumer thread's way out of one tile, whose first output is n and first row of x is m.
struct Finish {
    const Place& place;
    const Linear& linear;
    const Work& work;
    const float (&w_step)[RT][2];  // what a code counts, of each of its outputs
    char* y;
    float* workspace;
    int n, m, group, quarter;

    // 16 outputs x 8 rows of activations -> a warp's room, turned there; 16 rows of 32 bytes at a time -> y.
    DEVICE void write(int r, int j, const float* v) const {
        const int lane = place.lane;
        const uint32_t out = OUT + place.warp * OUT_BYTES;
        const int to = j * 8 % OUT_ROWS + (lane & 7), column = n + (group * RT + r) * 64 + quarter * 16;
        store_two_transposed(place.here + out + to * 32 + (((lane >> 3) ^ (to >> 2)) & 1) * 16,
                             to_pair(v[0] * w_step[r][0], v[1] * w_step[r][0]),
                             to_pair(v[2] * w_step[r][1], v[3] * w_step[r][1]));
        if ((j + 1) * 8 % OUT_ROWS) return;
        sync_warp();
        const int row = lane >> 1, half = lane & 1, into = m + (j + 1) * 8 - OUT_ROWS + row;
        const uint4 eight = *reinterpret_cast<const uint4*>(place.window + out + row * 32 + ((half ^ (row >> 2)) & 1) * 16);
        if (into < linear.rows && column + half * 8 < linear.N)
            *reinterpret_cast<uint4*>(y + (size_t(into) * linear.N + column + half * 8) * 2) = eight;
        sync_warp();
    }
    // Where a block leaves this thread's numbers of a part. It has two at most: one without its tile's first step, one with it.
    DEVICE float* slot_of(int block, bool has_first_step) const {
        return workspace + (size_t(2 * block + has_first_step) * (R * T / 4) + place.thread) * 4;
    }
    DEVICE void leave(float* slot, int r, int j, const float* v) const {
        store_partial(slot + (r * J + j) * CONSUMERS * 4, make_float4(v[0], v[1], v[2], v[3]));
    }
    // After this block's part of a tile is left -> whether the others' all are, so that it adds them up.
    DEVICE bool is_last(int tile, int* arrived) const {
        fence_device();
        sync_threads_of(1, CONSUMERS);
        const int from = work.first_block(tile), to = work.last_block(tile);
        int* const last = reinterpret_cast<int*>(place.window + LAST);
        if (place.thread == 0) {
            *last = count_arrival(arrived + tile) == to - from;
            if (*last) arrived[tile] = 0;
            fence_device();
        }
        sync_threads_of(1, CONSUMERS);
        return *last;
    }
    // All parts' numbers of 8 rows, from the j-th 8 rows on.
    template <int COUNT>
    DEVICE void add_parts(int tile, int r, int j, float (&total)[COUNT][4]) const {
        const int from = work.first_block(tile), to = work.last_block(tile);
#pragma unroll 1
        for (int block = from; block <= to; block++) {
            const float* theirs = slot_of(block, block == from);
            float4 four[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; i++) four[i] = load_partial(theirs + (r * J + j + i) * CONSUMERS * 4, true);
#pragma unroll
            for (int i = 0; i < COUNT; i++)
                total[i][0] += four[i].x, total[i][1] += four[i].y, total[i][2] += four[i].z, total[i][3] += four[i].w;
        }
    }
};
