// wgmma.m64nNk16 with both operands in shared memory, K-major.
#pragma once
#include "wgmma_operands.h"
template <int N>
DEVICE void wgmma_shared(float* d, uint64_t a, uint64_t b, int add);

// N, its number of sums; the places of a, b and `add` behind them
#define WGMMA_SHARED(N, SUMS, A, B, ADD)                                                                        \
    template <>                                                                                                 \
    DEVICE void wgmma_shared<N>(float* d, uint64_t a, uint64_t b, int add) {                                    \
        asm volatile(                                                                                           \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32" INPUTS " {" SUMS_##SUMS "}, %" #A ", %" #B         \
            ", p, 1, 1, 0, 0;\n}"                                                                               \
            : REGISTERS_##SUMS("+f", d, 0)                                                                      \
            : "l"(a), "l"(b), "r"(add));                                                                        \
    }
WGMMA_SHARED(8, 4, 4, 5, 6)
WGMMA_SHARED(16, 8, 8, 9, 10)
WGMMA_SHARED(32, 16, 16, 17, 18)
WGMMA_SHARED(64, 32, 32, 33, 34)
WGMMA_SHARED(128, 64, 64, 65, 66)
WGMMA_SHARED(256, 128, 128, 129, 130)
#undef WGMMA_SHARED
