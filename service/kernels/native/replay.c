/* Calls of other functions of the library, told before: a whole step without Python between them. */

#include "halftone.h"

struct call {
    void *function; /* of one pointer, `arguments` */
    const void *arguments;
    int64_t checks; /* it returns 0, or what it refuses; else nothing */
};

/* 0, or 1 + the first call that refused its arguments: those behind it were not made. */
EXPORT int64_t halftone_replay(const struct call *calls, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (!calls[i].checks)
            ((void (*)(const void *))calls[i].function)(calls[i].arguments);
        else if (((int64_t (*)(const void *))calls[i].function)(calls[i].arguments))
            return i + 1;
    }
    return 0;
}
