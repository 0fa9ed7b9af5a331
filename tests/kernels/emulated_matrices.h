// Tensor cores of the emulated machine: mma, what loads and stores its fragments, wgmma.
#pragma once
#include "emulated_memory.h"

// Fragments: A row = lane / 4 (+8 in registers 1, 3), k = 2 (lane % 4) (+8 in 2, 3); B n = lane / 4; C as A.
inline float a_element(const uint32_t* a, int kk) { return half(a[kk >> 3 << 1] >> 16 * (kk & 1)); }
template <float (*NUMBER)(uint16_t)>
inline void multiply_matrices(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) {
    struct Slot { float* c; const uint32_t* a; uint32_t b[2]; } slot{c, a, {b0, b1}};
    meet_warp(&slot, [](void** all) {
        float A[16][16], B[8][16];
        for (int l = 0; l < 32; l++) {
            Slot& s = *(Slot*)all[l];
            for (int r = 0; r < 4; r++)
                for (int e = 0; e < 2; e++)
                    A[l / 4 + 8 * (r & 1)][2 * (l & 3) + e + 8 * (r >> 1)] = NUMBER(s.a[r] >> 16 * e);
            for (int r = 0; r < 2; r++)
                for (int e = 0; e < 2; e++) B[l / 4][2 * (l & 3) + e + 8 * r] = NUMBER(s.b[r] >> 16 * e);
        }
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < 4; i++)
                for (int k = 0; k < 16; k++)
                    ((Slot*)all[l])->c[i] += A[l / 4 + 8 * (i >> 1)][k] * B[2 * (l & 3) + (i & 1)][k];
    });
}
inline void mma(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) { multiply_matrices<half>(c, a, b0, b1); }
inline void mma_halves(float* c, const uint32_t* a, uint32_t b0, uint32_t b1) { multiply_matrices<to_float>(c, a, b0, b1); }
inline void load_matrices(uint32_t* r, uint32_t address) {
    struct Slot { uint32_t *r, address; } slot{r, address};
    meet_warp(&slot, [](void** all) {
        for (int l = 0; l < 32; l++)
            for (int j = 0; j < 4; j++)
                memcpy(&((Slot*)all[l])->r[j], at_shared(((Slot*)all[8 * j + l / 4])->address + 4 * (l & 3)), 4);
    });
}
inline void load_matrices_transposed(uint32_t* r, uint32_t address) {
    struct Slot { uint32_t *r, address; } slot{r, address};
    meet_warp(&slot, [](void** all) {
        for (int l = 0; l < 32; l++)
            for (int j = 0; j < 4; j++)
                for (int e = 0; e < 2; e++)
                    memcpy((char*)&((Slot*)all[l])->r[j] + 2 * e, at_shared(((Slot*)all[8 * j + 2 * (l & 3) + e])->address + 2 * (l / 4)), 2);
    });
}
inline uint32_t transposed(uint32_t pair) {
    uint32_t result = 0;
    struct Slot { uint32_t in, *out; } slot{pair, &result};
    meet_warp(&slot, [](void** all) {
        for (int l = 0; l < 32; l++) {
            uint32_t both = 0;
            for (int e = 0; e < 2; e++) {  // element (row 2 (l%4) + e, column l/4)
                const uint32_t from = ((Slot*)all[4 * (2 * (l & 3) + e) + l / 8])->in;
                both |= (from >> 16 * (l / 4 & 1) & 0xffff) << 16 * e;
            }
            *((Slot*)all[l])->out = both;
        }
    });
    return result;
}
inline void store_two_transposed(uint32_t address, uint32_t a, uint32_t b) {
    struct Slot { uint32_t address, r[2]; } slot{address, {a, b}};
    meet_warp(&slot, [](void** all) {
        for (int l = 0; l < 32; l++)
            for (int j = 0; j < 2; j++)
                for (int e = 0; e < 2; e++)  // element (row l/4, column 2 (l%4) + e) goes to row `column`, place l/4
                    memcpy(at_shared(((Slot*)all[8 * j + 2 * (l & 3) + e])->address + 2 * (l / 4)),
                           (char*)&((Slot*)all[l])->r[j] + 2 * e, 2);
    });
}
inline void store_matrices(uint32_t address, const uint32_t* r) {
    struct Slot { uint32_t address; const uint32_t* r; } slot{address, r};
    meet_warp(&slot, [](void** all) {
        for (int l = 0; l < 32; l++)
            for (int j = 0; j < 4; j++)
                memcpy(at_shared(((Slot*)all[8 * j + l / 4])->address + 4 * (l & 3)), &((Slot*)all[l])->r[j], 4);
    });
}

inline void wgmma_fence() {}
template <int N>
inline void wgmma(float* d, const uint32_t* a, uint64_t b, int add) { me->wgmmas.open.push_back({d, a, b, add, N}); }
inline void wgmma_commit() { me->wgmmas.done.push_back(std::move(me->wgmmas.open)); me->wgmmas.open.clear(); }
template <int N>
inline void wgmma_wait() {
    const int lane = me->thread & 127;
    for (; me->wgmmas.done.size() > N; me->wgmmas.done.pop_front())
        for (const Wgmma& mine : me->wgmmas.done.front())
            meet(me->block->groups[me->thread / 128], lane, 128, (void*)&mine, [](void** all) {
                Wgmma& first = *(Wgmma*)all[0];
                if (first.act) return first.act(all);
                const int wide = first.b >> 62 == 1;  // rows of 128 bytes, else of 64; 8 of them are a group
                if ((first.b >> 32 & 0x3fff) != (wide ? 64 : 32)) { printf("descriptor?\n"); abort(); }
                const uint32_t base = (first.b & 0x3fff) << 4;
                static float A[64][16], B[256][16];
                for (int l = 0; l < 128; l++)
                    for (int r = 0; r < 4; r++)
                        for (int e = 0; e < 2; e++)
                            A[l / 32 * 16 + l % 32 / 4 + 8 * (r & 1)][2 * (l & 3) + e + 8 * (r >> 1)] =
                                half(((Wgmma*)all[l])->a[r] >> 16 * e);
                for (int n = 0; n < first.n; n++)
                    for (int k = 0; k < 16; k++) {
                        uint32_t at = base + (wide ? n * 128 : n * 64) + 2 * k;
                        at ^= (at >> 7 & (wide ? 7 : 3)) << 4;
                        uint16_t bits;
                        memcpy(&bits, me->block->memory + at, 2);  // a descriptor means the block it is in
                        B[n][k] = half(bits);
                    }
                for (int l = 0; l < 128; l++) {
                    Wgmma& w = *(Wgmma*)all[l];
                    for (int i = 0; i < first.n / 2; i++) {
                        const float* row = A[l / 32 * 16 + l % 32 / 4 + 8 * (i >> 1 & 1)];
                        const float* column = B[i / 4 * 8 + 2 * (l & 3) + (i & 1)];
                        float sum = w.add ? w.d[i] : 0;
                        for (int k = 0; k < 16; k++) sum += row[k] * column[k];
                        w.d[i] = sum;
                    }
                }
            });
}

inline void read_operand(uint64_t descriptor, int rows, float (*to)[16]) {
    if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 64) { printf("descriptor?\n"); abort(); }
    for (int r = 0; r < rows; r++)
        for (int k = 0; k < 16; k++) {
            uint32_t at = ((descriptor & 0x3fff) << 4) + r * 128 + 2 * k;
            at ^= (at >> 7 & 7) << 4;
            uint16_t bits;
            memcpy(&bits, me->block->memory + at, 2);  // a descriptor means the block it is in
            to[r][k] = half(bits);
        }
}
inline void multiply_shared(void** all) {  // of the 128 threads of a warpgroup
    static float w[64][16], x[256][16];
    const Wgmma& first = *(Wgmma*)all[0];
    read_operand(first.a_at, 64, w), read_operand(first.b, first.n, x);
    for (int l = 0; l < 128; l++) {
        const Wgmma& one = *(Wgmma*)all[l];
        if (one.a_at != first.a_at || one.b != first.b || one.add != first.add) { printf("not one wgmma\n"); abort(); }
        for (int i = 0; i < first.n / 2; i++) {
            const float* row = w[l / 32 * 16 + l % 32 / 4 + 8 * (i >> 1 & 1)];
            const float* column = x[i / 4 * 8 + 2 * (l & 3) + (i & 1)];
            float sum = one.add ? one.d[i] : 0;
            for (int k = 0; k < 16; k++) sum += row[k] * column[k];
            one.d[i] = sum;
        }
    }
}
template <int N>
inline void wgmma_shared(float* d, uint64_t a, uint64_t b, int add) {
    me->wgmmas.open.push_back({d, nullptr, b, add, N, a, multiply_shared});
}
