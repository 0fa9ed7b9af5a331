// The machine of kernels/cuda/machine.h on a CPU: every thread of a cluster is a fiber; warps, warpgroups, blocks and clusters
// meet where the hardware would make them meet. Late by intent: cp.async lands when it is waited for, wgmma reads its
// operands when it is waited for, so that a buffer given back too early shows. Layouts are those of PTX ISA 8.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <ucontext.h>
#include <vector>

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { int x; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define KERNEL extern "C" void
#define DEVICE inline
#define GRID_CONSTANT const
#define __restrict__
#define __launch_bounds__(...)
#define __cluster_dims__(...)

struct Meeting {
    int arrived = 0;
    uint64_t round = 0;
    void* slot[128];
};
struct Wgmma { float* d; const uint32_t* a; uint64_t b; int add, n; uint64_t a_at = 0; void (*act)(void**) = nullptr; };
struct Group { std::vector<Wgmma> open; std::deque<std::vector<Wgmma>> done; };
struct Barrier { int expected = 0, pending = 0; long bytes = 0; uint32_t phase = 0; };
struct Block {
    char* memory;
    int rank, index;
    std::vector<Meeting> warps, groups, block;
    std::map<int, Meeting> named;
    std::vector<std::function<void()>> stores;  // handed over at a barrier, seen by nobody else yet
    std::map<uint32_t, Barrier> barriers;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Block* block;
    int thread;
    bool over = false;
    std::vector<std::function<void()>> open_copies;
    std::deque<std::vector<std::function<void()>>> copies;
    Group wgmmas;
    std::vector<std::function<void()>> stores;
    bool awaited = false;  // its predecessor
    uint64_t cluster_round = 0;
};
inline ucontext_t scheduler;
inline Fiber* me;
inline std::vector<Block> blocks;
inline Meeting cluster_meeting;
inline int threads_of_block, cluster_size;
inline dim3 emulated_grid;
#define threadIdx (dim3{me->thread})
#define blockIdx (dim3{me->block->index})
#define gridDim emulated_grid
#define SHARED_MEMORY char* shared = me->block->memory + 1024;

inline void yield() { swapcontext(&me->context, &scheduler); }
// The last of `count` to arrive does `act`, then all go on.
template <class Act>
inline void meet(Meeting& m, int lane, int count, void* mine, Act act) {
    m.slot[lane & 127] = mine;
    const uint64_t round = m.round;
    if (++m.arrived == count) {
        act(m.slot);
        m.arrived = 0;
        m.round++;
    } else
        while (m.round == round) yield();
}
inline Meeting& my_warp() { return me->block->warps[me->thread / 32]; }
template <class Act>
inline void meet_warp(void* mine, Act act) { meet(my_warp(), me->thread & 31, 32, mine, act); }

inline void stop() { abort(); }
// As on the chip, an address says whose memory it means.
inline uint32_t shared_address(const void* p) { return uint32_t((const char*)p - me->block->memory) | me->block->rank << 24; }
inline uint32_t mine(uint32_t address) {
    if (int(address >> 24) != me->block->rank) { printf("another block's address\n"); abort(); }
    return address & 0xffffff;
}
inline char* at_shared(uint32_t address) { return me->block->memory + mine(address); }
inline void sync_warp() { meet_warp(nullptr, [](void**) {}); }
inline void sync_block() { meet(me->block->block[0], 0, threads_of_block, nullptr, [](void**) {}); }

inline void copy_later(uint32_t to, const void* from, int bytes) {
    char* there = at_shared(to);
    if ((uintptr_t(from) | to) % bytes) { printf("misaligned cp.async\n"); abort(); }
    me->open_copies.push_back([=] { memcpy(there, from, bytes); });
}
inline void copy16(uint32_t to, const void* from) { copy_later(to, from, 16); }
inline void copy8(uint32_t to, const void* from) { copy_later(to, from, 8); }
inline void copy4(uint32_t to, const void* from) { copy_later(to, from, 4); }
inline void copies_commit() { me->copies.push_back(std::move(me->open_copies)); me->open_copies.clear(); }
template <int N>
inline void copies_wait() {
    for (; me->copies.size() > N; me->copies.pop_front())
        for (auto& c : me->copies.front()) c();
}

inline float to_float(uint16_t bits) { _Float16 v; memcpy(&v, &bits, 2); return float(v); }
inline float power_of_2(float v) {  // what is subnormal is 0, as ex2.approx.ftz has it
    const float power = exp2f(v);
    return power < 1.17549435e-38f ? 0 : power;
}
inline float inverse_root(float v) { return 1 / sqrtf(v); }
inline float bits_to_float(uint32_t bits) { float v; memcpy(&v, &bits, 4); return v; }
inline uint32_t float_to_bits(float v) { uint32_t bits; memcpy(&bits, &v, 4); return bits; }
inline uint16_t half_of(float v) { _Float16 h = (_Float16)v; uint16_t b; memcpy(&b, &h, 2); return b; }
inline uint16_t to_brain(float v) {  // to the nearest, ties to even
    const uint32_t b = float_to_bits(v);
    return v != v ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
#if BF16
inline float half(uint16_t bits) { return bits_to_float(uint32_t(bits) << 16); }
inline uint16_t bits_of(float v) { return to_brain(v); }
#else
inline float half(uint16_t bits) { return to_float(bits); }
inline uint16_t bits_of(float v) { return half_of(v); }
#endif
template <class F>
inline uint32_t each_half(uint32_t a, uint32_t b, uint32_t c, F f) {
    return bits_of(f(half(a), half(b), half(c))) | uint32_t(bits_of(f(half(a >> 16), half(b >> 16), half(c >> 16)))) << 16;
}
inline uint32_t subtract(uint32_t a, uint32_t b) { return each_half(a, b, 0, [](float x, float y, float) { return x - y; }); }
inline uint32_t multiply(uint32_t a, uint32_t b) { return each_half(a, b, 0, [](float x, float y, float) { return x * y; }); }
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    return each_half(a, b, c, [](double x, double y, double z) { return x * y + z; });
}
inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }
inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) { return (a & mask) | (b & ~mask); }
inline uint32_t to_pair(float low, float high) { return bits_of(low) | uint32_t(bits_of(high)) << 16; }
inline float fused(float a, float b, float c) { return fmaf(a, b, c); }
inline float reciprocal(float v) { return 1 / v; }
inline uint32_t to_halves(float low, float high) { return half_of(low) | uint32_t(half_of(high)) << 16; }
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
    return to_halves(to_float(a) - to_float(b), to_float(a >> 16) - to_float(b >> 16));
}
inline float e4m3(uint8_t v) {
    const int exponent = v >> 3 & 15, mantissa = v & 7;
    const float size = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
    return (v & 7) == 7 && exponent == 15 ? NAN : v & 128 ? -size : size;
}
inline uint16_t to_e4m3(float low, float high) {
    uint16_t both = 0;
    for (int i = 0; i < 2; i++) {
        const float v = i ? high : low, size = fabsf(v);
        int best = 0;  // of all codes the nearest, of two the even one
        for (int code = 1; code < 127; code++) {
            const float nearer = fabsf(e4m3(code) - size) - fabsf(e4m3(best) - size);
            if (nearer < 0 || (nearer == 0 && code % 2 == 0)) best = code;
        }
        both |= (v != v ? 127 : best | (std::signbit(v) ? 128 : 0)) << 8 * i;
    }
    return both;
}
inline void e4m3_to_halves(uint32_t& low, uint32_t& high, uint32_t codes) {
    low = to_halves(e4m3(codes), e4m3(codes >> 8)), high = to_halves(e4m3(codes >> 16), e4m3(codes >> 24));
}
template <int TABLE>
inline uint32_t look_up_at(uint32_t offset) { uint32_t v; memcpy(&v, me->block->memory + TABLE + offset, 4); return v; }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= uint32_t(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
inline uint4 load_global16(const void* p) { uint4 v; memcpy(&v, p, 16); return v; }
inline void demand_awaited();
inline uint4 load_fresh16(const void* p) { demand_awaited(); return load_global16(p); }
inline float load_global(const float* p) { return *p; }

inline float shuffle_xor(float v, int mask) {
    float result = 0;
    struct Slot { float in, *out; } slot{v, &result};
    meet_warp(&slot, [mask](void** all) {
        for (int l = 0; l < 32; l++) *((Slot*)all[l])->out = ((Slot*)all[l ^ mask])->in;
    });
    return result;
}
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

// Between launches and between blocks. What a thread stores for others arrives no sooner than its fence.
inline void release_successor() {}
inline void await_predecessor() { me->awaited = true; }
inline void demand_awaited() {
    if (!me->awaited) { printf("touches what its predecessor may still use\n"); abort(); }
}
inline void hold(float&) {}
inline void hold(uint32_t&) {}
inline void store_partial(float* to, float4 v) { demand_awaited(), me->stores.push_back([=] { memcpy(to, &v, 16); }); }
inline float4 load_partial(const float* from, bool is_wanted) {
    float4 v = {0, 0, 0, 0};
    if (is_wanted) memcpy(&v, from, 16);
    return v;
}
inline void fence_device() {
    for (auto* stores : {&me->block->stores, &me->stores}) {
        for (auto& store : *stores) store();
        stores->clear();
    }
}
inline uint32_t flag_value(const uint32_t* flag) { demand_awaited(); return *(volatile const uint32_t*)flag; }
inline void flag_publish(uint32_t* flag, uint32_t value) { *(volatile uint32_t*)flag = value; }
inline void flag_await(const uint32_t* flag, uint32_t value) { while (flag_value(flag) != value) yield(); }
// A fence also covers what others of its block stored before a barrier that it has passed.
inline void hand_over() {
    for (auto& store : me->stores) me->block->stores.push_back(store);
    me->stores.clear();
}
template <int NAME, int THREADS>
inline void sync_named() {
    hand_over();
    meet(me->block->named[NAME], 0, THREADS, nullptr, [](void**) {});
}
template <int NAME, int THREADS>
inline void arrive_named() {
    hand_over();
    Meeting& m = me->block->named[NAME];
    if (++m.arrived == THREADS) m.arrived = 0, m.round++;
}

inline void cluster_arrive() {
    me->cluster_round = cluster_meeting.round;
    if (++cluster_meeting.arrived == threads_of_block * cluster_size) cluster_meeting.arrived = 0, cluster_meeting.round++;
}
inline void cluster_arrive_begun() { cluster_arrive(); }
inline void cluster_wait() { while (cluster_meeting.round == me->cluster_round) yield(); }
inline void store_remote(uint32_t address, int rank, float4 v) { memcpy(blocks[rank].memory + mine(address), &v, 16); }

inline void settle(Barrier& b) {
    if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.expected;
}
inline void barrier_init(uint32_t barrier, int arrivals) { me->block->barriers[mine(barrier)] = {arrivals, arrivals, 0, 0}; }
inline void barriers_visible() {}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    Barrier& b = me->block->barriers.at(mine(barrier));
    b.bytes += bytes, b.pending--;
    settle(b);
}
inline void barrier_arrive_at(uint32_t barrier, int rank) {
    Barrier& b = blocks[rank].barriers.at(mine(barrier));
    b.pending--;
    settle(b);
}
inline void barrier_arrive(uint32_t barrier) { barrier_arrive_at(barrier, me->block->rank); }
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    Barrier& b = me->block->barriers.at(mine(barrier));
    while (b.phase == parity) yield();  // the phase of that parity is not over yet
}
inline void bytes_landed(Block& block, uint32_t barrier, long bytes) {
    Barrier& b = block.barriers.at(mine(barrier));
    b.bytes -= bytes;
    settle(b);
}
inline void fence_copies() {}
inline void send_remote(uint32_t address, int rank, float4 v, uint32_t barrier) {
    memcpy(blocks[rank].memory + mine(address), &v, 16);
    bytes_landed(blocks[rank], barrier, 16);
}
constexpr uint64_t READ_ONCE = 0, KEEP = 0;
// opaque: base, columns, rows, bytes of a row, bytes of an element, box columns, box rows, swizzled (0, 1; 2: and read at any time)
inline void copy_box_to_many(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint16_t ranks, uint64_t) {
    const uint64_t* m = map->opaque;
    const long size = m[4];
    if (m[7] == 1) demand_awaited();
    if (mine(to) % (m[7] ? 1024 : 128)) { printf("misaligned box\n"); abort(); }
    for (int rank = 0; ranks >> rank; rank++) {
        if (!(ranks >> rank & 1)) continue;
        uint32_t at = mine(to);
        for (int r = 0; r < int(m[6]); r++)
            for (int c = 0; c < int(m[5]); c++, at += size) {
                char* there = blocks[rank].memory + (m[7] ? at ^ ((at >> 7 & 7) << 4) : at);
                if (row + r < int(m[2]) && column + c < int(m[1]))
                    memcpy(there, (char*)m[0] + (row + r) * m[3] + (column + c) * size, size);
                else
                    memset(there, 0, size);
            }
        bytes_landed(blocks[rank], barrier, m[5] * m[6] * size);
    }
}
inline void copy_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t) {
    copy_box_to_many(to, map, column, row, barrier, 1 << me->block->rank, 0);
}
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    if ((to | uintptr_t(from) | bytes) % 16) { printf("misaligned bulk copy\n"); abort(); }
    memcpy(at_shared(to), from, bytes);
    bytes_landed(*me->block, barrier, bytes);
}
template <int N>
inline void registers_raise() {}
template <int N>
inline void registers_lower() {}

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

// Each word arrives later by some looks of whoever looks, a later one perhaps before an earlier one.
inline std::multimap<uint64_t, std::function<void()>> words_on_their_way;
inline uint64_t looks = 0;
inline uint32_t lateness = 1;
inline void word_store(float* to, uint32_t bits) {
    demand_awaited();
    lateness = lateness * 1664525 + 1013904223;
    words_on_their_way.insert({looks + (lateness >> 20), [=] { memcpy(to, &bits, 4); }});
}
inline void words_arrive(uint64_t until) {
    auto& words = words_on_their_way;
    for (; !words.empty() && words.begin()->first <= until; words.erase(words.begin())) words.begin()->second();
}
inline void launch_over() { words_arrive(~uint64_t(0)); }
constexpr uint32_t ABSENT = 0xffffffff;
inline void part_give(float* to, float4 v) {
    const float numbers[4] = {v.x, v.y, v.z, v.w};
    for (int i = 0; i < 4; i++) word_store(to + i, numbers[i] == numbers[i] ? float_to_bits(numbers[i]) : 0x7fffffff);
}
inline float4 part_look(const float* from) {
    demand_awaited(), words_arrive(++looks);
    return {from[0], from[1], from[2], from[3]};
}
inline bool is_there(float4 v) {
    for (float number : {v.x, v.y, v.z, v.w})
        if (float_to_bits(number) == ABSENT) return false;
    return true;
}
inline void part_take(float* from) {
    for (int i = 0; i < 4; i++) word_store(from + i, ABSENT);
}
inline bool look_again(int&) { yield(); return true; }
inline void prefetch_box(const TensorMap* map, int column, int row) {
    const uint64_t* m = map->opaque;
    if (row < 0 || column < 0 || row >= int(m[2]) || column >= int(m[1])) { printf("nothing of it is there to prefetch\n"); abort(); }
}
inline void prefetch_map(const TensorMap*) {}
inline float load_number(const uint16_t* p) { return half(*p); }
// All blocks of a launch are one cluster of the emulator's; a pair are neighbours in it.
inline int first_of_pair() { return me->block->rank / 2 * 2; }
inline void arrive_in_pair(uint32_t barrier, int rank) { barrier_arrive_at(barrier, first_of_pair() + rank); }
inline void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t) {
    copy_box_to_many(to, map, column, row, barrier, 3 << first_of_pair(), 0);
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

inline std::function<void()> emulated_kernel;
inline uint32_t emulated_order = 0;  // 0: all blocks of a cluster in step; else a seed by which blocks are held up
inline bool is_held_up() {
    if (!emulated_order) return false;
    emulated_order = emulated_order * 1664525 + 1013904223;
    return emulated_order >> 30;  // three times in four
}
// Runs `kernel` over a grid, one cluster after the other. Blocks that wait for each other are one cluster here.
inline void emulate(int grid, int cluster, int threads, std::function<void()> kernel) {
    constexpr size_t MEMORY = 1 << 18, STACK = 1 << 16;
    emulated_grid = {grid};
    threads_of_block = threads;
    cluster_size = cluster;
    emulated_kernel = std::move(kernel);
    for (int first = 0; first < grid; first += cluster) {
        blocks.assign(cluster, {});
        std::deque<Fiber> fibers;
        cluster_meeting = {};
        for (int rank = 0; rank < cluster; rank++) {
            Block& b = blocks[rank];
            b.memory = (char*)aligned_alloc(1 << 16, MEMORY);
            memset(b.memory, 0xff, MEMORY);  // every half a NaN
            b.rank = rank, b.index = first + rank;
            b.warps.resize(threads / 32), b.groups.resize(threads / 32), b.block.resize(2);
            for (int t = 0; t < threads; t++) {
                Fiber& f = fibers.emplace_back();
                f.stack.resize(STACK);
                f.block = &b, f.thread = t;
                getcontext(&f.context);
                f.context.uc_stack = {f.stack.data(), 0, STACK};
                f.context.uc_link = &scheduler;
                makecontext(&f.context, +[] { emulated_kernel(); me->over = true; }, 0);
            }
        }
        for (size_t left = fibers.size(); left;)
            for (int rank = 0; rank < cluster; rank++) {
                if (is_held_up()) continue;
                for (int t = 0; t < threads; t++) {
                    Fiber& f = fibers[size_t(rank) * threads + t];
                    if (f.over) continue;
                    me = &f;
                    swapcontext(&scheduler, &f.context);
                    left -= f.over;
                }
            }
        for (Block& b : blocks) free(b.memory);
    }
}
