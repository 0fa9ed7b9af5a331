// What w16_tile.cu asks of the machine beyond machine.h: boxes from shared memory to memory, a reciprocal in one instruction.
// Here as PTX and as its stand-in on a CPU.
#pragma once
#include "machine.h"

constexpr uint64_t NORMAL = 0x1000000000000000ull;  // L2
#ifdef __CUDACC__
#include "wgmma_shared.h"
DEVICE float quick_reciprocal(float v) {  // within an ulp; 0 of what is above 2^126
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}
// The copy engine reads shared memory later; what a box has beyond the matrix is not written. Groups are a thread's own.
DEVICE void store_box(const TensorMap* map, uint32_t from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(from)
                 : "memory");
}
DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
DEVICE void stores_wait_read() {  // all groups but the last N have been read: their shared memory is free
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>
DEVICE void stores_wait() {  // ... have been written
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
#else
inline float quick_reciprocal(float v) { return 1 / v; }
// Late by intent: a box is read when its group is waited for, so that shared memory written too early shows.
struct Stores {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> done;
};
inline std::map<Fiber*, Stores> stores_of;
inline void store_box(const TensorMap* map, uint32_t from, int column, int row) {
    demand_awaited();
    const uint64_t* m = map->opaque;  // as copy_box_to_many has it
    const char* memory = me->block->memory;
    if (mine(from) % 1024) { printf("misaligned box\n"); abort(); }
    stores_of[me].open.push_back([=, at = mine(from)] {
        for (int r = 0; r < int(m[6]); r++)
            for (int c = 0; c < int(m[5]); c++) {
                const uint32_t here = at + (r * m[5] + c) * m[4];
                if (row + r < int(m[2]) && column + c < int(m[1]))
                    memcpy((char*)m[0] + (row + r) * m[3] + (column + c) * m[4], memory + (here ^ ((here >> 7 & 7) << 4)), m[4]);
            }
    });
}
inline void stores_commit() { stores_of[me].done.push_back(std::move(stores_of[me].open)), stores_of[me].open.clear(); }
template <int N>
inline void stores_wait() {
    for (auto& done = stores_of[me].done; done.size() > N; done.pop_front())
        for (auto& store : done.front()) store();
}
template <int N>
inline void stores_wait_read() { stores_wait<N>(); }
#endif
