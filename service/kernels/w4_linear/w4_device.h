// What the W4 kernels share: the parts of a merged layer, and how codes become weights.
#pragma once
#include "machine.h"
#ifdef __CUDACC__
#include "wgmma_registers.h"
#endif

#ifndef AFFINE  // (code - zero) * scale; else NF4's levels times absmax
#define AFFINE 0
#endif
#ifndef BITS  // of a code: 4, or of affine ones 3
#define BITS 4
#endif
#ifndef GROUP  // weights of an output under one scale: 64 or, of affine codes, 128
#define GROUP (AFFINE ? 128 : 64)
#endif
static_assert(BITS == 4 || BITS == 3 && AFFINE);
static_assert(GROUP == 64 || GROUP == 128 && AFFINE);
constexpr int TILE_BYTES = 128 * BITS;  // codes of 16 outputs and 64 K
constexpr int SETS = 128 / GROUP;       // of scales for 128 K

// The parts of a merged layer under nested absmax: the first block of 16 rows of each, the place of its first absmax
// in the numbering that nested blocks of 256 cut (parts start a block of their own), and its offset.
struct Parts {
    int count;
    int begin[4];
    int first[4];
    float offset[4];
};

DEVICE uint32_t nf4_level(uint32_t code) {  // four of the sixteen a constant
#if BF16
    const uint64_t low = code & 4 ? 0x0000bdbabe3dbe92ull : 0xbecabf06bf32bf80ull;
    const uint64_t high = code & 4 ? 0x3f803f393f103ee2ull : 0x3ead3e7c3e253da3ull;
#else
    const uint64_t low = code & 4 ? 0x0000add4b1eab48dull : 0xb652b833b992bc00ull;
    const uint64_t high = code & 4 ? 0x3c0039c93880370dull : 0x356833e031262d18ull;
#endif
    return uint32_t((code & 8 ? high : low) >> (16 * (code & 3))) & 0xffff;
}
DEVICE uint32_t nf4_pair(uint32_t byte) { return nf4_level(byte & 15) | nf4_level(byte >> 4) << 16; }
// 256 pairs, one copy for each lane's bank: a byte's pair is decoded once and stored 32 times, 16 bytes at a time;
// the rotation by the thread spreads a warp's stores over the banks.
DEVICE void fill_table(char* table, int thread, int threads) {
    for (int i = thread; i < 512; i += threads) {
        const uint32_t pair = nf4_pair(i >> 1);
        const uint4 four = make_uint4(pair, pair, pair, pair);
#pragma unroll
        for (int j = 0; j < 4; j++)
            *reinterpret_cast<uint4*>(table + (i >> 1) * 128 + (i & 1) * 64 + ((j + (i >> 1)) & 3) * 16) = four;
    }
}
template <int TABLE>
DEVICE void decode_nf4(uint32_t word, uint32_t bank, uint32_t* a) {  // bank: 4 lane
    a[0] = look_up_at<TABLE>(and_or(word << 7, 0x7f80, bank));
    a[1] = look_up_at<TABLE>(and_or(word >> 1, 0x7f80, bank));
    a[2] = look_up_at<TABLE>(and_or(word >> 9, 0x7f80, bank));
    a[3] = look_up_at<TABLE>(and_or(word >> 17, 0x7f80, bank));
}
// The same with entries 256 bytes apart: the byte is put into the address by one instruction. The other half of an entry
// has room for another table of 256 words.
DEVICE void fill_wide_table(char* table, const float* second, int thread, int threads) {
    for (int i = thread; i < 512; i += threads) {
        const uint32_t pair = nf4_pair(i >> 1);
        const float value = load_global(second + (i >> 1));
        const uint4 four = make_uint4(pair, pair, pair, pair);
        const float4 values = make_float4(value, value, value, value);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            char* at = table + (i >> 1) * 256 + (i & 1) * 64 + ((j + (i >> 1)) & 3) * 16;
            *reinterpret_cast<uint4*>(at) = four;
            *reinterpret_cast<float4*>(at + 128) = values;
        }
    }
}
template <int BYTE>
DEVICE uint32_t entry(uint32_t word, uint32_t bank) {
    return permute(word, bank, 0x7604 | BYTE << 4);
}
template <int TABLE>
DEVICE void decode_nf4_wide(uint32_t word, uint32_t bank, uint32_t* a) {
    a[0] = look_up_at<TABLE>(entry<0>(word, bank));
    a[1] = look_up_at<TABLE>(entry<1>(word, bank));
    a[2] = look_up_at<TABLE>(entry<2>(word, bank));
    a[3] = look_up_at<TABLE>(entry<3>(word, bank));
}
template <int BYTE, int TABLE>
DEVICE float wide_level(uint32_t word, uint32_t bank) {
    return bits_to_float(look_up_at<TABLE + 128>(entry<BYTE>(word, bank)));
}
// A lane's codes of a tile, as they lie in shared memory, and the word of each fragment.
struct Codes {
#if BITS == 3  // bit 3 of a nibble is one of the last fragment's; who decodes a word does not read it
    uint2 first;
    uint32_t third;
    DEVICE Codes(const char* tile, int lane)
        : first(*reinterpret_cast<const uint2*>(tile + lane * 8)),
          third(*reinterpret_cast<const uint32_t*>(tile + 256 + lane * 4)) {}
    DEVICE void words(uint32_t* four) const {
        four[0] = first.x, four[1] = first.y, four[2] = third;
        four[3] = select_bits(first.x >> 1, select_bits(first.y >> 2, third >> 3, 0x22222222), 0x44444444);
    }
#else
    uint4 word;
    DEVICE Codes(const char* tile, int lane) : word(*reinterpret_cast<const uint4*>(tile + lane * 16)) {}
    DEVICE void words(uint32_t* four) const { four[0] = word.x, four[1] = word.y, four[2] = word.z, four[3] = word.w; }
#endif
};
// Registers 0 and 2 hold row g, 1 and 3 row g + 8. float16: 1024 + code, or 1024 + 16 code, less the zero; bfloat16:
// 128 + code, or with three bits 128 + 16 code, less the zero. Exact.
constexpr uint32_t FIRST = BITS == 3 ? 0x00070007 : 0x000f000f, SECOND = FIRST << 4;
#if BF16 && BITS == 3
DEVICE void decode_affine(uint32_t word, uint32_t low_zero, uint32_t high_zero, uint32_t* a) {
    const uint32_t upper = word >> 8;
    a[0] = subtract(and_or(word, FIRST, 0x43004300), low_zero);
    a[1] = multiply_add(and_or(word, SECOND, 0x43004300), 0x3d803d80, high_zero);  // / 16
    a[2] = subtract(and_or(upper, FIRST, 0x43004300), low_zero);
    a[3] = multiply_add(and_or(upper, SECOND, 0x43004300), 0x3d803d80, high_zero);
}
DEVICE uint32_t low_zero_of(uint32_t zeros) { return (zeros & 15) * 0x10001u + 0x43004300u; }     // 128 + zero
DEVICE uint32_t high_zero_of(uint32_t zeros) { return (zeros & 0xf0) * 0x10001u + 0xc100c100u; }  // -(8 + zero)
#elif BF16
DEVICE void decode_affine(uint32_t word, uint32_t low_zero, uint32_t high_zero, uint32_t* a) {
    a[0] = subtract(and_or(word, 0x000f000f, 0x43004300), low_zero);
    a[1] = subtract(and_or(word >> 4, 0x000f000f, 0x43004300), high_zero);
    a[2] = subtract(and_or(word >> 8, 0x000f000f, 0x43004300), low_zero);
    a[3] = subtract(and_or(word >> 12, 0x000f000f, 0x43004300), high_zero);
}
DEVICE uint32_t low_zero_of(uint32_t zeros) { return (zeros & 15) * 0x10001u + 0x43004300u; }  // 128 + zero
DEVICE uint32_t high_zero_of(uint32_t zeros) { return (zeros >> 4) * 0x10001u + 0x43004300u; }
#else
DEVICE void decode_affine(uint32_t word, uint32_t low_zero, uint32_t high_zero, uint32_t* a) {
    const uint32_t upper = word >> 8;
    a[0] = subtract(and_or(word, FIRST, 0x64006400), low_zero);
    a[1] = multiply_add(and_or(word, SECOND, 0x64006400), 0x2c002c00, high_zero);  // / 16
    a[2] = subtract(and_or(upper, FIRST, 0x64006400), low_zero);
    a[3] = multiply_add(and_or(upper, SECOND, 0x64006400), 0x2c002c00, high_zero);
}
DEVICE uint32_t low_zero_of(uint32_t zeros) { return (zeros & 15) * 0x10001u + 0x64006400u; }     // 1024 + zero
DEVICE uint32_t high_zero_of(uint32_t zeros) { return (zeros & 0xf0) * 0x10001u + 0xd400d400u; }  // -(64 + zero)
#endif
struct Part {
    int begin, first;
    float offset;
};
DEVICE Part part_of(const Parts& parts, int block) {  // selected, not indexed: no copy in local memory
    Part part = {parts.begin[0], parts.first[0], parts.offset[0]};
#pragma unroll
    for (int i = 1; i < 4; i++)
        if (i < parts.count && block >= parts.begin[i]) part = {parts.begin[i], parts.first[i], parts.offset[i]};
    return part;
}
// Place of the absmax of a block's first row, first tile.
DEVICE int first_absmax(const Parts& parts, int block, int tiles) {
    const Part part = part_of(parts, block);
    return part.first + (block - part.begin) * 16 * tiles;
}
