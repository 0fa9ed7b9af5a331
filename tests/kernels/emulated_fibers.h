// Threads of the emulated machine: fibers, where they meet, and a launch of them all. What a fiber or a block holds for the
// rest of the machine is declared here, too.
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
template <int N>
inline void registers_raise() {}
template <int N>
inline void registers_lower() {}
inline void hold(float&) {}
inline void hold(uint32_t&) {}
inline float shuffle_xor(float v, int mask) {
    float result = 0;
    struct Slot { float in, *out; } slot{v, &result};
    meet_warp(&slot, [mask](void** all) {
        for (int l = 0; l < 32; l++) *((Slot*)all[l])->out = ((Slot*)all[l ^ mask])->in;
    });
    return result;
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
