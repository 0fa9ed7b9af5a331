/* One growing piece of memory for what an op needs between its steps: the interpreter's lock, which every op
   keeps, makes its user the only one. */

#include "halftone.h"

enum { SYS_MMAP = 9, SYS_MUNMAP = 11, READ_WRITE = 3, PRIVATE_ANONYMOUS = 0x22, LEAST_BYTES = 1 << 20 };

static void *kept;
static int64_t kept_bytes;

static long map(long bytes) {
    long result;
    register long flags __asm__("r10") = PRIVATE_ANONYMOUS;
    register long file __asm__("r8") = -1;
    register long offset __asm__("r9") = 0;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(SYS_MMAP), "D"(0), "S"(bytes), "d"(READ_WRITE), "r"(flags), "r"(file), "r"(offset)
                     : "rcx", "r11", "memory");
    return result;
}

static void unmap(void *address, long bytes) {
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(SYS_MUNMAP), "D"(address), "S"(bytes) : "rcx", "r11", "memory");
}

void *workspace(int64_t bytes) {
    if (bytes <= kept_bytes) return kept;
    int64_t wanted = LEAST_BYTES;
    while (wanted < bytes) wanted *= 2;
    long found = map(wanted);
    if (found < 0) __builtin_trap(); /* out of address space: as a failed allocation inside any C library ends */
    if (kept) unmap(kept, kept_bytes);
    kept = (void *)found;
    kept_bytes = wanted;
    return kept;
}
