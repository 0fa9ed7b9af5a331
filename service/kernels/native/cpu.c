/* What this CPU can do, and the four functions that a compiler calls even where there is no libc. */

#include "halftone.h"

typedef unsigned long size;

enum { ZMM_STATE = 0xe6 }; /* XCR0: the system saves xmm, ymm, mask and both halves of the zmm registers */

static void cpuid(uint32_t leaf, uint32_t subleaf, uint32_t found[4]) {
    __asm__ volatile("cpuid"
                     : "=a"(found[0]), "=b"(found[1]), "=c"(found[2]), "=d"(found[3])
                     : "a"(leaf), "c"(subleaf));
}

static int has(uint32_t word, int bit) { return word >> bit & 1; }

/* 512 where the sources of the name _avx512 may run, else 0. */
EXPORT int32_t halftone_cpu(void) {
    uint32_t found[4];
    cpuid(0, 0, found);
    if (found[0] < 7) return 0;
    cpuid(1, 0, found);
    if (!has(found[2], 27)) return 0; /* OSXSAVE */
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & ZMM_STATE) != ZMM_STATE) return 0;
    cpuid(7, 0, found);
    uint32_t most = found[0], b = found[1], c = found[2];
    /* F, DQ, BW, VL; AVX2, BMI1, BMI2; VNNI */
    if (!(has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && has(b, 5) && has(b, 3) && has(b, 8) && has(c, 11)))
        return 0;
    if (most < 1) return 0;
    cpuid(7, 1, found);
    return has(found[0], 5) ? 512 : 0; /* BF16 */
}

void *memcpy(void *restrict to, const void *restrict from, size count) {
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(count) : : "memory");
    return start;
}

void *memset(void *to, int value, size count) {
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(count) : "a"(value) : "memory");
    return start;
}

void *memmove(void *to, const void *from, size count) {
    char *target = to;
    const char *source = from;
    if (target <= source || target >= source + count) return memcpy(to, from, count);
    while (count--) target[count] = source[count];
    return to;
}

int memcmp(const void *left, const void *right, size count) {
    const unsigned char *a = left, *b = right;
    for (size i = 0; i < count; i++)
        if (a[i] != b[i]) return a[i] - b[i];
    return 0;
}
