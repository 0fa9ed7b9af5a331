// wgmma of two operands in shared memory, 32 bytes of K: int8 with int32 sums, and e4m3 with float sums.
#pragma once
#include "wgmma_operands.h"
template <int N>
DEVICE void wgmma_codes(int* d, uint64_t a, uint64_t b, int add);
template <int N>
DEVICE void wgmma_fp8(float* d, uint64_t a, uint64_t b, int add);

// N, its number of sums, their type and kind of register; the types of sums and operands; what follows the predicate;
// the places of a, b and `add` behind the sums
#define WGMMA_BYTES(NAME, N, SUMS, Sum, KIND, TYPES, NEGATIONS, A, B, ADD)                                      \
    template <>                                                                                                 \
    DEVICE void NAME<N>(Sum* d, uint64_t a, uint64_t b, int add) {                                              \
        asm volatile(                                                                                           \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k32" TYPES " {" SUMS_##SUMS "}, %" #A ", %" #B ", p"        \
            NEGATIONS ";\n}"                                                                                    \
            : REGISTERS_##SUMS(KIND, d, 0)                                                                      \
            : "l"(a), "l"(b), "r"(add));                                                                        \
    }
#define WGMMA_CODES(N, SUMS, A, B, ADD) WGMMA_BYTES(wgmma_codes, N, SUMS, int, "+r", ".s32.s8.s8", "", A, B, ADD)
#define WGMMA_FP8(N, SUMS, A, B, ADD) WGMMA_BYTES(wgmma_fp8, N, SUMS, float, "+f", ".f32.e4m3.e4m3", ", 1, 1", A, B, ADD)
WGMMA_CODES(16, 8, 8, 9, 10)
WGMMA_CODES(32, 16, 16, 17, 18)
WGMMA_CODES(64, 32, 32, 33, 34)
WGMMA_CODES(128, 64, 64, 65, 66)
WGMMA_CODES(256, 128, 128, 129, 130)
WGMMA_FP8(16, 8, 8, 9, 10)
WGMMA_FP8(32, 16, 16, 17, 18)
WGMMA_FP8(64, 32, 32, 33, 34)
WGMMA_FP8(128, 64, 64, 65, 66)
WGMMA_FP8(256, 128, 128, 129, 130)
#undef WGMMA_FP8
#undef WGMMA_CODES
#undef WGMMA_BYTES
