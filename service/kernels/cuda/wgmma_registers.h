// wgmma.m64nNk16 with the weights as the register operand.
#pragma once
#include "wgmma_operands.h"
template <int N>
DEVICE void wgmma(float* d, const uint32_t* a, uint64_t b, int add);

// N, its number of sums; the places of a's four registers, of b and of `add` behind them
#define WGMMA(N, SUMS, A0, A1, A2, A3, B, ADD)                                                                  \
    template <>                                                                                                 \
    DEVICE void wgmma<N>(float* d, const uint32_t* a, uint64_t b, int add) {                                    \
        asm volatile(                                                                                           \
            "{\n.reg .pred p;\nsetp.ne.b32 p, %" #ADD ", 0;\n"                                                  \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32" INPUTS " {" SUMS_##SUMS "}, {%" #A0 ",%" #A1 ",%"  \
            #A2 ",%" #A3 "}, %" #B ", p, 1, 1, 0;\n}"                                                           \
            : REGISTERS_##SUMS("+f", d, 0)                                                                      \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                    \
    }
WGMMA(8, 4, 4, 5, 6, 7, 8, 9)
WGMMA(16, 8, 8, 9, 10, 11, 12, 13)
WGMMA(32, 16, 16, 17, 18, 19, 20, 21)
WGMMA(64, 32, 32, 33, 34, 35, 36, 37)
WGMMA(128, 64, 64, 65, 66, 67, 68, 69)
WGMMA(192, 96, 96, 97, 98, 99, 100, 101)
WGMMA(256, 128, 128, 129, 130, 131, 132, 133)
#undef WGMMA
