/* What every source of the native library includes: fixed types, exports, and the pool's one call.

   The library depends on no other, not even libc, so that one file loads beside glibc and musl: no
   allocation, no math functions, no thread-local storage. A source whose name ends in _avx512 is compiled
   for AVX512 (F, BW, DQ, VL, BF16, VNNI) and called only where `halftone_cpu` finds it; the others run on any
   x86-64. Python's threads may have small stacks (128 KiB under musl): keep locals under 64 KiB. */

#ifndef HALFTONE_H
#define HALFTONE_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

typedef uint16_t bf16; /* the upper half of a float */

/* One tile of a job; tiles may run in any order, at once, and on any thread. */
typedef void (*tile_function)(const void *arguments, int64_t tile);

/* Runs tiles 0 .. tiles - 1 on the caller and the pool's threads; returns when all are done.

   A caller that finds the pool taken (another thread's job, or a tile that calls this) runs its tiles alone.
   Handing a job out costs about a microsecond: give work of less than that one tile. */
void parallel(tile_function function, const void *arguments, int64_t tiles);

/* Memory of at least this size for the call that runs, 64-byte aligned, undefined contents. There is one for the
   process, kept for the next call, so an op asks once, before `parallel`, and lays out all that it needs. */
void *workspace(int64_t bytes);

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

#endif
