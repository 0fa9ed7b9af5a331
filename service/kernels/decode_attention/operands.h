// A page's K and V as operands of mma, a step of 16 dimensions after the other: numbers as they are, codes as float16.
//
// An ldmatrix of codes brings 32 dimensions, four neighbouring codes of a token a register. Of K all four belong to one
// row of the operand: the first two and the last two are its pairs, and q is read in that order. Of V, transposed, two
// dimensions of two tokens: even dimensions are the operand's rows 0..7, odd ones 8..15.
#pragma once
#include "layout.h"

// four codes -> float16 of (0, 1) and (2, 3) or, of V, of (0, 2) and (1, 3); exact
template <bool OF_V>
DEVICE void halves(uint32_t& first, uint32_t& second, uint32_t codes) {
    if (CODES == 1) {  // 128 + code below 0x64 is the float16 1024 + 128 + code
        const uint32_t bytes = codes ^ 0x80808080;
        first = subtract_halves(permute(bytes, 0x64646464, OF_V ? 0x4240 : 0x4140), 0x64806480);
        second = subtract_halves(permute(bytes, 0x64646464, OF_V ? 0x4341 : 0x4342), 0x64806480);
    } else
        e4m3_to_halves(first, second, OF_V ? permute(codes, codes, 0x3120) : codes);
}

// Where a lane's row of sixteen bytes lies within a box, for each 32 of its 128 bytes: `keys` as K's tokens are rows of
// the operand, `values` as V's are its columns. Codes of both are read as the first.
struct Places {
    uint32_t keys[4], values[4];
};
DEVICE Places places_of(int lane) {
    const int row = lane & 7, low = lane >> 3 & 1, high = lane >> 4;
    Places to;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to.keys[i] = (row + 8 * low) * 128 + (((2 * i + high) ^ row) << 4);
        to.values[i] = (row + 8 * high) * 128 + (((2 * i + low) ^ row) << 4);
    }
    return to;
}

// use(step, operand A) for each step of a page: K [16 tokens x 16 dimensions], or V^T [16 dimensions x 16 tokens].
template <bool OF_V, class Use>
DEVICE void each_step(uint32_t page, const Places& at, Use use) {
    constexpr int READ = CODES ? 2 : 1;  // steps at once
#pragma unroll
    for (int i = 0; i < (STEPS + READ - 1) / READ; i++) {
        uint32_t found[4], a[4];
        const uint32_t from = page + (i >> 2) * BOX_BYTES + (OF_V && !CODES ? at.values : at.keys)[i & 3];
        if (OF_V) load_matrices_transposed(found, from);
        else load_matrices(found, from);
        if (!CODES) {
            use(i, found);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 2 && 2 * i + j < STEPS; j++) {  // tokens 0..7, then 8..15
            if (OF_V) halves<true>(a[0], a[1], found[2 * j]), halves<true>(a[2], a[3], found[2 * j + 1]);
            else halves<false>(a[0], a[2], found[2 * j]), halves<false>(a[1], a[3], found[2 * j + 1]);
            use(2 * i + j, a);
        }
    }
}
DEVICE void multiply(float* sum, const uint32_t* a, uint32_t b0, uint32_t b1) {
    if (CODES) mma_halves(sum, a, b0, b1);
    else mma(sum, a, b0, b1);
}
