// Memory of the emulated machine: what arrives when. Copies, stores for other blocks, barriers and the copy engine.
#pragma once
#include "emulated_numbers.h"

// Between launches and between blocks. What a thread stores for others arrives no sooner than its fence.
inline void release_successor() {}
inline void await_predecessor() { me->awaited = true; }
inline void demand_awaited() {
    if (!me->awaited) { printf("touches what its predecessor may still use\n"); abort(); }
}
inline uint4 load_global16(const void* p) { uint4 v; memcpy(&v, p, 16); return v; }
inline uint4 load_fresh16(const void* p) { demand_awaited(); return load_global16(p); }
inline float load_global(const float* p) { return *p; }
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
constexpr uint64_t READ_ONCE = 0, KEEP = 0, NORMAL = 0;
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
inline void prefetch_box(const TensorMap* map, int column, int row) {
    const uint64_t* m = map->opaque;
    if (row < 0 || column < 0 || row >= int(m[2]) || column >= int(m[1])) { printf("nothing of it is there to prefetch\n"); abort(); }
}
inline void prefetch_map(const TensorMap*) {}
// All blocks of a launch are one cluster of the emulator's; a pair are neighbours in it.
inline int first_of_pair() { return me->block->rank / 2 * 2; }
inline void arrive_in_pair(uint32_t barrier, int rank) { barrier_arrive_at(barrier, first_of_pair() + rank); }
inline void copy_box_to_pair(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier, uint64_t) {
    copy_box_to_many(to, map, column, row, barrier, 3 << first_of_pair(), 0);
}

// Boxes on their way to memory: read when their group is waited for, so that shared memory written too early shows.
struct Stores {
    std::vector<std::function<void()>> open;
    std::deque<std::vector<std::function<void()>>> done;
};
inline std::map<Fiber*, Stores> stores_of;
inline void store_box(const TensorMap* map, uint32_t from, int column, int row) {
    demand_awaited();
    const uint64_t* m = map->opaque;
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
