// A variant of w8_tile.cu: its constants, and what a block keeps where in shared memory. variants.py knows the same sizes.
#pragma once
#include "w8_device.h"

#ifndef FP8
#define FP8 0
#endif
#ifndef TILE
#define TILE 64
#endif
#ifndef RT
#define RT 1
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef CAP  // listed columns of a part that are taken out of the stages
#define CAP 64
#endif
#ifndef PER_SM  // blocks that fit a multiprocessor: with 2, a launch works while the next one already reads its weights
#define PER_SM 1
#endif
constexpr int T = TILE, WGS = 2, R = 64 * RT * WGS, CONSUMERS = 128 * WGS, J = T / 8;
// FP8 leaves threads and registers to blocks of its neighbours: docs/experiments.md, section 9, third run
constexpr int THREADS = CONSUMERS + (FP8 ? 32 : 128);
constexpr int W_BYTES = R * 128, X_BYTES = T * 128, STAGE_BYTES = W_BYTES + X_BYTES;
constexpr int WORDS = FP8 ? 0 : 1024;                  // of the bitmap: up to 32,768 columns
constexpr int PIECE = T < 128 || RT * T < 256 ? T : 64;  // rows of x whose sums become floats at a time
constexpr int LISTED_AT_A_TIME = 32, ROOM = PIECE * LISTED_AT_A_TIME * 2;
constexpr bool GATHERS = !FP8 && T >= 128;
constexpr int OUT_ROWS = 16, OUT_BYTES = OUT_ROWS * 32;  // of results, where a warp turns them
constexpr bool MOVES_REGISTERS = PER_SM == 1 && !FP8;
constexpr int CONSUMER_REGISTERS = RT * T < 256 ? 216 : 224, PRODUCER_REGISTERS = RT * T < 256 ? 72 : 56;

// Addresses in shared memory; the first 1024 bytes are the system's. Barriers:
//   FULL, EMPTY    of each stage: W and x have come; consumers and who copies codes are done with it
//   READY, FREE    of each of two rooms: outliers are there; consumers are done with them
//   CODED, TAKEN   a part's codes are copied; consumers are done with them
//   LISTED         the bitmap is read and counted
// and LAST, a number: whether this block adds up a tile's parts.
constexpr int FULL = 1024, EMPTY = FULL + 8 * STAGES, READY = FULL + 192, FREE = READY + 16, CODED = READY + 32;
constexpr int TAKEN = READY + 40, LISTED = READY + 48, LAST = READY + 56, COLUMNS = FULL + 256;
constexpr int X_STEPS = FULL + 384, BITMAP = X_STEPS + T * 8;
constexpr int BEFORE = BITMAP + WORDS * 4, CODES = BEFORE + (FP8 ? 0 : WORDS / 2 + 16);
constexpr int X_OUT = (CODES + (FP8 ? 0 : R * CAP) + 1023) / 1024 * 1024, OUT = X_OUT + (FP8 ? 0 : 2 * ROOM);
constexpr int RING = (OUT + WGS * 4 * OUT_BYTES + 1023) / 1024 * 1024;
constexpr int END = RING + STAGES * STAGE_BYTES;
static_assert(END * PER_SM <= 228 * 1024 && STAGES <= 12 && CAP % LISTED_AT_A_TIME == 0 && T <= CONSUMERS);
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END - 1024);  // what the host asks for
#endif

#if FP8
using Sum = float;
#else
using Sum = int;
#endif

// Who a thread is, and its block's shared memory: `here` for the copy engine, barriers and wgmma, `window` for all else.
struct Place {
    uint32_t here;
    char* window;
    int thread, lane, warp;
};
// To the ring's next stage, and the parity of its barriers' next phase.
DEVICE void advance(uint32_t& stage, uint32_t& phase) {
    if (++stage == STAGES) stage = 0, phase ^= 1;
}
// To the other room of outliers, likewise.
DEVICE void advance_room(uint32_t& room, uint32_t& phase) { room ^= 1, phase ^= room == 0; }
// How far a consumer is.
struct Progress {
    uint32_t coded = 0, ready = 0, phase = 0;  // parities that it waits for next: of codes, of a room and of a stage
    uint32_t room = 0, stage = 0, done = 0;    // `done`: the stage that it gives back next
};
