// What a variant is: the definitions that it is compiled under, and where it keeps what in shared memory.
#pragma once
#include "machine.h"

#ifndef DIM
#define DIM 128
#endif
#ifndef GROUP  // query heads that share a KV head
#define GROUP 4
#endif
#ifndef CODES  // pages hold 0: numbers of the activations' type; codes, 1: int8, 2: E4M3
#define CODES 0
#endif
#ifndef NORMED  // q and k are normed before they are rotated
#define NORMED 0
#endif
#ifndef CAPPED  // scores become softcap * tanh(score / softcap)
#define CAPPED 0
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef SPLITS
#define SPLITS 1
#endif
#ifndef PER_SM
#define PER_SM 1
#endif
#if SPLITS > 1
#define IN_CLUSTERS __cluster_dims__(SPLITS, 1, 1)
#else
#define IN_CLUSTERS
#endif
constexpr int PAGE = 16, THREADS = WARPS * 32, TILES = (GROUP + 7) / 8, HEADS = TILES * 8, STRIDE = WARPS * SPLITS;
constexpr int STEPS = DIM / 16;  // of mma
constexpr int NUMBER_BYTES = CODES ? 1 : 2, ROW_BYTES = DIM * NUMBER_BYTES;  // of a head in a page
// a box: 16 tokens, 128 bytes of each, under the 128-byte swizzle
constexpr int BOX_DIMS = 128 / NUMBER_BYTES, BOXES = (DIM + BOX_DIMS - 1) / BOX_DIMS;
constexpr int BOX_BYTES = PAGE * 128, PAGE_BYTES = BOXES * BOX_BYTES, STAGE_BYTES = 2 * PAGE_BYTES;
constexpr int SCALE_BYTES = CODES ? PAGE * 4 : 0;  // of a page and head: a token's bfloat16 of K, then of V
// A head's row is rotated 16 dimensions at a time: 8 of its left half and the 8 of the right that they mix with.
constexpr int PIECES = DIM / 16, LANES = PIECES <= 1 ? 1 : PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : 16;
constexpr int ROWS_AT_ONCE = THREADS / LANES;
constexpr int Q_BYTES = 2 * DIM + 16;        // of a head: 16 more keep the banks apart, and hold its divisor
constexpr int SUM_NUMBERS = DIM + 4;         // of a head's sums, likewise
constexpr int SHARE = (GROUP * DIM / 4 + SPLITS - 1) / SPLITS;  // of the group's dimensions, four at a time, that a block adds up
// offsets into shared memory; FRESH: the new token's K and V, and their scales
constexpr int RECEIVED = 8 * WARPS * STAGES, Q = (RECEIVED + 8 + 15) / 16 * 16, FRESH = Q + HEADS * Q_BYTES;
constexpr int SCALES = FRESH + 2 * ROW_BYTES + (CODES ? 16 : 0), STATES = SCALES + WARPS * STAGES * SCALE_BYTES;
constexpr int PARTS = (STATES + WARPS * HEADS * 8 + 15) / 16 * 16, PART_STATES = PARTS + (SPLITS > 1 ? SPLITS * SHARE * 16 : 0);
constexpr int RING = (PART_STATES + (SPLITS > 1 ? SPLITS * HEADS * 16 : 0) + 1023) / 1024 * 1024;
// a warp's sums take the place of its pages
constexpr int PAGES_BYTES = STAGES * STAGE_BYTES, SUMS_BYTES = (HEADS * SUM_NUMBERS * 4 + 1023) / 1024 * 1024;
constexpr int WARP_BYTES = PAGES_BYTES > SUMS_BYTES ? PAGES_BYTES : SUMS_BYTES, END = RING + WARPS * WARP_BYTES;
static_assert(DIM % 16 == 0 && DIM <= 256 && GROUP <= 16 && STAGES <= 32 && END <= 232448);
#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END);  // what the host asks for
#endif
