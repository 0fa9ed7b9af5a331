// Rows for w8_tile.cu, quantized where they are made: x16 = norm(hidden + delta) * gain, or silu(gate) * up; its int8 codes
// with zeros for outliers, the row's step, and the bits of columns with outliers. One block a row, the row in registers.
//
// Bits are set by OR: their order does not matter, and a row without outliers touches nothing. `spent` is another site's
// bitmap, read for the last time by a kernel that is over, which is cleared for its next use.
#include "../../service/kernels/w8_linear/w8_device.h"

#ifdef __CUDACC__
DEVICE void or_global(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }
DEVICE float exponential(float v) { return __expf(v); }
DEVICE float nearest(float v) { return rintf(v); }
#else  // on a CPU
inline void or_global(uint32_t* word, uint32_t bits) { *word |= bits; }
inline float exponential(float v) { return std::exp(v); }
inline float nearest(float v) { return std::nearbyint(v); }
#endif

#ifndef SILU
#define SILU 0
#endif
#ifndef ROW_THREADS
#define ROW_THREADS 512
#endif
#ifndef ROW_CHUNKS  // of 8 columns that a thread has
#define ROW_CHUNKS 1
#endif
constexpr int WARPS = ROW_THREADS / 32;

struct Eight {
    float v[8];
};
DEVICE Eight eight_at(const uint16_t* from) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = float_of(uint16_t(words[i / 2] >> 16 * (i & 1)));
    return out;
}
DEVICE float rounded(float v) { return float_of(uint16_t(to_pair(v, 0))); }
DEVICE void store_halves(uint16_t* to, const Eight& e) {
    *reinterpret_cast<uint4*>(to) = {to_pair(e.v[0], e.v[1]), to_pair(e.v[2], e.v[3]), to_pair(e.v[4], e.v[5]),
                                     to_pair(e.v[6], e.v[7])};
}
// The sum, or the largest, of all threads' values; `room` is one float a warp.
template <class Join>
DEVICE float of_block(float v, float* room, int thread, Join join) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) v = join(v, shuffle_xor(v, mask));
    if ((thread & 31) == 0) room[thread >> 5] = v;
    sync_block();
    v = room[0];
#pragma unroll
    for (int i = 1; i < WARPS; i++) v = join(v, room[i]);
    return v;
}

// SILU: `first` is gate_up [rows, 2 width], the rest of the inputs are not read. Else hidden, delta and total [rows, width].
KERNEL __launch_bounds__(ROW_THREADS)
w8_rows(const uint16_t* first, const uint16_t* delta, const uint16_t* __restrict__ gain, const int* live, uint16_t* total,
        uint16_t* x16, char* codes, float* steps, uint32_t* bitmap, uint32_t* spent, int spent_words, int width, float eps,
        float threshold) {
    SHARED_MEMORY
    float* const room = reinterpret_cast<float*>(shared);
    const int thread = threadIdx.x, row = blockIdx.x;
    const size_t start = size_t(row) * width;
    await_predecessor();
    release_successor();
    if (row == 0)
        for (int i = thread; i < spent_words; i += ROW_THREADS) spent[i] = 0;
    const bool is_live = row < *live;
    Eight x[ROW_CHUNKS];
    float squares = 0;
#pragma unroll
    for (int c = 0; c < ROW_CHUNKS; c++) {
        const int column = (c * ROW_THREADS + thread) * 8;
        x[c] = {};
        if (column >= width) continue;
        if (SILU) {
            x[c] = eight_at(first + 2 * start + column);
            const Eight up = eight_at(first + 2 * start + width + column);
#pragma unroll
            for (int i = 0; i < 8; i++) x[c].v[i] = rounded(x[c].v[i] / (1 + exponential(-x[c].v[i])) * up.v[i]);
        } else {
            x[c] = eight_at(first + start + column);
            const Eight more = eight_at(delta + start + column);
#pragma unroll
            for (int i = 0; i < 8; i++) x[c].v[i] = rounded(x[c].v[i] + more.v[i]), squares += x[c].v[i] * x[c].v[i];
            store_halves(total + start + column, x[c]);
        }
    }
    if (!SILU) {
        const float scale = inverse_root(of_block(squares, room, thread, [](float a, float b) { return a + b; }) / width + eps);
#pragma unroll
        for (int c = 0; c < ROW_CHUNKS; c++) {
            const int column = (c * ROW_THREADS + thread) * 8;
            if (column >= width) continue;
            const Eight by = eight_at(gain + column);
#pragma unroll
            for (int i = 0; i < 8; i++) x[c].v[i] = rounded(rounded(x[c].v[i] * scale) * by.v[i]);
        }
    }
    float most = 0;
#pragma unroll
    for (int c = 0; c < ROW_CHUNKS; c++) {
        const int column = (c * ROW_THREADS + thread) * 8;
        if (column >= width) continue;
        store_halves(x16 + start + column, x[c]);
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float size = x[c].v[i] < 0 ? -x[c].v[i] : x[c].v[i];
            if (size >= threshold || !is_live) bits |= is_live << i, x[c].v[i] = 0;
            else most = size > most ? size : most;
        }
        if (bits) or_global(bitmap + column / 32, bits << column % 32);
    }
    most = of_block(most, room + WARPS, thread, [](float a, float b) { return a > b ? a : b; });
    const float factor = most > 0 ? 127 / most : 0;
    if (thread == 0) steps[row] = most / 127;
#pragma unroll
    for (int c = 0; c < ROW_CHUNKS; c++) {
        const int column = (c * ROW_THREADS + thread) * 8;
        if (column >= width) continue;
        uint32_t words[2] = {};
#pragma unroll
        for (int i = 0; i < 8; i++) words[i / 4] |= uint32_t(int(nearest(x[c].v[i] * factor)) & 255) << 8 * (i & 3);
        *reinterpret_cast<uint2*>(codes + start + column) = {words[0], words[1]};
    }
}
