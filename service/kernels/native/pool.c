/* Threads that wait inside the library and share out the tiles of one job at a time.

   Python starts them (`halftone_worker` is a daemon thread's whole life, the interpreter's lock released), so
   no thread library is linked. Tiles are taken from a counter, so a thread that sleeps or is preempted holds
   nobody up: the caller works too, and waits only for threads that are inside a tile.

   epoch: odd while a job is open, even between jobs. A worker enters by counting itself into `active` and then
   looking at the epoch again; the caller closes the epoch and then waits until `active` is zero. Both orders
   are sequentially consistent, so either the worker sees the close or the caller sees the worker, and the
   job's fields never change under a worker's eyes. */

#include "halftone.h"

enum { SPIN_CYCLES = 80000 }; /* of the time stamp counter, 20 to 40 us: a decode step's gaps between ops */
enum { SYS_SCHED_YIELD = 24, SYS_FUTEX = 202, FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129 };

static struct {
    tile_function function;
    const void *arguments;
    int64_t tiles;
    _Alignas(64) int64_t next; /* the tile to be taken next */
    _Alignas(64) uint32_t epoch;
    uint32_t sleeping;      /* workers in, or on their way into, the kernel's wait */
    int32_t workers;        /* those that take part: numbers 0 .. workers - 1 */
    uint32_t taken;         /* a caller is inside `parallel` */
    _Alignas(64) uint32_t active;
} pool;

static long system_call(long number, const void *a, long b, long c) {
    long result;
    register long d __asm__("r10") = 0;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(d) : "rcx", "r11", "memory");
    return result;
}

static void take_tiles(void) {
    for (;;) {
        int64_t tile = __atomic_fetch_add(&pool.next, 1, __ATOMIC_RELAXED);
        if (tile >= pool.tiles) return;
        pool.function(pool.arguments, tile);
    }
}

static int takes_part(int32_t number) { return number < __atomic_load_n(&pool.workers, __ATOMIC_RELAXED); }

/* Returns the epoch once it is another than `seen`: spins for a while, if it takes part, then sleeps. */
static uint32_t next_epoch(uint32_t seen, int32_t number) {
    uint64_t start = __builtin_ia32_rdtsc();
    for (;;) {
        uint32_t epoch = __atomic_load_n(&pool.epoch, __ATOMIC_ACQUIRE);
        if (epoch != seen) return epoch;
        if (takes_part(number) && __builtin_ia32_rdtsc() - start < SPIN_CYCLES) {
            __builtin_ia32_pause();
            continue;
        }
        __atomic_fetch_add(&pool.sleeping, 1, __ATOMIC_SEQ_CST);
        system_call(SYS_FUTEX, &pool.epoch, FUTEX_WAIT_PRIVATE, seen); /* at once if it is no longer `seen` */
        __atomic_fetch_sub(&pool.sleeping, 1, __ATOMIC_SEQ_CST);
    }
}

/* A worker's life: never returns. */
EXPORT void halftone_worker(int32_t number) {
    uint32_t seen = __atomic_load_n(&pool.epoch, __ATOMIC_ACQUIRE);
    for (;;) {
        if (seen & 1 && takes_part(number)) {
            __atomic_fetch_add(&pool.active, 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&pool.epoch, __ATOMIC_SEQ_CST) == seen) take_tiles();
            __atomic_fetch_sub(&pool.active, 1, __ATOMIC_SEQ_CST);
        }
        seen = next_epoch(seen, number);
    }
}

void parallel(tile_function function, const void *arguments, int64_t tiles) {
    uint32_t is_free = 0;
    if (tiles < 2 || pool.workers == 0 ||
        !__atomic_compare_exchange_n(&pool.taken, &is_free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        for (int64_t tile = 0; tile < tiles; tile++) function(arguments, tile);
        return;
    }
    pool.function = function;
    pool.arguments = arguments;
    pool.tiles = tiles;
    __atomic_store_n(&pool.next, 0, __ATOMIC_RELAXED);
    __atomic_fetch_add(&pool.epoch, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&pool.sleeping, __ATOMIC_SEQ_CST))
        system_call(SYS_FUTEX, &pool.epoch, FUTEX_WAKE_PRIVATE, INT32_MAX); /* some may not take part */
    take_tiles();
    __atomic_fetch_add(&pool.epoch, 1, __ATOMIC_SEQ_CST);
    uint64_t start = __builtin_ia32_rdtsc();
    while (__atomic_load_n(&pool.active, __ATOMIC_SEQ_CST)) {
        if (__builtin_ia32_rdtsc() - start < SPIN_CYCLES)
            __builtin_ia32_pause();
        else /* a worker was preempted inside its tile */
            system_call(SYS_SCHED_YIELD, 0, 0, 0);
    }
    __atomic_store_n(&pool.taken, 0, __ATOMIC_RELEASE);
}

/* How many of the workers that were started take part from the next job on. */
EXPORT void halftone_set_workers(int32_t workers) { __atomic_store_n(&pool.workers, workers, __ATOMIC_RELAXED); }

/* In a process just forked: none of the workers came along. */
EXPORT void halftone_forget_workers(void) {
    pool.epoch &= ~1u;
    pool.sleeping = pool.workers = pool.taken = pool.active = 0;
}

static void count_tile(const void *arguments, int64_t tile) {
    __atomic_fetch_add(&((int64_t *)arguments)[tile], 1, __ATOMIC_RELAXED);
}

/* Adds one to counts[0 .. tiles - 1]: the pool's own test. */
EXPORT void halftone_count_tiles(int64_t *counts, int64_t tiles) { parallel(count_tile, counts, tiles); }
