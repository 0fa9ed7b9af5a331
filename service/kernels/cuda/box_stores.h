// Boxes from shared memory to memory by the copy engine: PTX here, its stand-in on a CPU in tests/kernels/emulated_memory.h.
#pragma once
#include "machine.h"
#ifdef __CUDACC__
// Shared memory is read later, see `stores_wait_read`; what a box has beyond the matrix is not written. Groups are a thread's own.
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
#endif
