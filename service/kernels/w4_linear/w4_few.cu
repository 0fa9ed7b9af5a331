// W4 linear for up to 8 rows, or 16: weights stream once, every block has all of K.
//
// y[m, n] = sum_k w[n, k] x[m, k]; w = nf4(code) * absmax (groups of 64) or (code - zero) * scale (of 64 or 128), codes of
// 4 bits or 3, zeros 4-bit, absmax 8-bit codes under nested absmax and an offset a part; layout: layout.py.
//
//   persistent block: 16 outputs at a time; chunks of 128 input features are dealt to its warps in turn
//       warp: chunks arrive through its own cp.async ring, across outputs without a gap; x comes from shared memory in
//             the order of mma's B fragments, four loads of 16 bytes a chunk
//
// B's columns beyond `rows` repeat the first row: nobody reads those sums. Sums of the warps are added in shared memory
// in a fixed order, one block of outputs later; nothing crosses blocks, so bits do not depend on the run.
// Registers and shared memory let two blocks live on a multiprocessor: the next launch's, dependent, fills its rings
// while this one works.
#include "w4_device.h"

#ifndef WARPS
#define WARPS 16
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef PER_SM
#define PER_SM 2
#endif
#ifndef TILES  // of 8 rows of x
#define TILES 1
#endif
#ifndef WIDE_TABLE  // NF4's table has entries 256 bytes apart, 64 KiB: fewer instructions, less room for another block
#define WIDE_TABLE 0
#endif
constexpr int THREADS = WARPS * 32;
// chunk of the ring: codes of two tiles, then scales 32 of each set and behind them zeros 8 of each, 16 apart, or absmax 2 x 16
constexpr int CODE_BYTES = 2 * TILE_BYTES, ZEROS = CODE_BYTES + 32 * SETS;
constexpr int CHUNK_BYTES = CODE_BYTES + (AFFINE ? 48 * SETS : 32);
// addresses in shared memory; the first 1024 bytes are the system's
constexpr int MAP = 1024, TABLE = 2048, RING = AFFINE ? 1024 : TABLE + (WIDE_TABLE ? 65536 : 32768);
constexpr int PARTIALS = (RING + WARPS * STAGES * CHUNK_BYTES + 127) / 128 * 128;
constexpr int ROW_PARTIALS = WARPS * 64;  // bytes: [warp][16 outputs]; rows follow, and two rounds in turn
static_assert(WARPS % 2 == 0 && WARPS >= 8 * TILES);

#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == PARTIALS - 1024);  // what the host asks for, besides what grows with the rows
#endif

// N: outputs as packed, a multiple of 16; width: of them in y, a multiple of 8. K: a multiple of 128.
// Shared memory: SHARED_BYTES + rows * (2 * WARPS * 64 + 2 * K + 64).
KERNEL __launch_bounds__(THREADS, PER_SM)
w4_few(const char* __restrict__ codes, const char* __restrict__ scales, const char* __restrict__ zeros,
       const float* __restrict__ nested, const float* __restrict__ map, const char* __restrict__ x,
       char* __restrict__ y, int rows, int N, int width, int K, GRID_CONSTANT Parts parts) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
    const int units = N / 16, chunks = K / 128, tiles = K / 64;
    const int x_row_bytes = K * 2 + 64;  // rows 16 banks apart
    const int x_at = PARTIALS + rows * ROW_PARTIALS * 2;
    const uint32_t ring = RING + warp * STAGES * CHUNK_BYTES;

    // The chunk that is fetched next, its codes, and its place among the scales (a place for each set of a chunk); the
    // first lanes copy scales or absmax, 16 bytes each, the next ones zeros.
    const int turns = (chunks - warp + WARPS - 1) / WARPS;
    int next_unit = warp < chunks ? blockIdx.x : units, next_chunk = warp;
    const char* next_codes = codes + (size_t(next_unit) * chunks + warp) * CODE_BYTES + lane * 16;
    const size_t to_next_unit = size_t(gridDim.x) * chunks * CODE_BYTES - turns * WARPS * CODE_BYTES;
    int next_place = warp * SETS * units + next_unit;
    constexpr int SCALE_LANES = AFFINE ? 2 * SETS : 2;
    const char* side = scales + lane * units * 16;
    if (AFFINE)
        side = lane < SCALE_LANES ? scales + ((lane >> 1) * units * 2 + (lane & 1)) * 16 : zeros + (lane - SCALE_LANES) * units * 8;
    const int side_bytes = !AFFINE ? 16 : lane < SCALE_LANES ? 32 : 8;
    uint32_t next_stage = ring;
    auto fetch = [&]() {
        if (next_unit < units) {
            const uint32_t to = here + next_stage + lane * 16;
            copy16(to, next_codes);
            if (lane * 16 < CODE_BYTES - 512) copy16(to + 512, next_codes + 512);
            const char* from = side + size_t(next_place) * side_bytes;
            if (lane < SCALE_LANES) copy16(to + CODE_BYTES, from);
            if (AFFINE && lane - SCALE_LANES >= 0 && lane - SCALE_LANES < SETS) copy8(to + CODE_BYTES, from);
            next_chunk += WARPS, next_codes += WARPS * CODE_BYTES, next_place += WARPS * SETS * units;
            if (next_chunk >= chunks) {
                next_chunk = warp, next_codes += to_next_unit, next_unit += gridDim.x;
                next_place = warp * SETS * units + next_unit;
            }
        }
        copies_commit();
        next_stage = next_stage == ring + (STAGES - 1) * CHUNK_BYTES ? ring : next_stage + CHUNK_BYTES;
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();
    release_successor();
    if (!AFFINE) {
        if (WIDE_TABLE) fill_wide_table(window + TABLE, map, thread, THREADS);
        else {
            fill_table(window + TABLE, thread, THREADS);
            for (int i = thread; i < 256; i += THREADS) reinterpret_cast<float*>(window + MAP)[i] = load_global(map + i);
        }
    }

    await_predecessor();
    // 16 consecutive words of x, two features each, are a 4 x 4 matrix to turn: lane t reads words t, 4 + t, 8 + t, 12 + t.
    const int pieces = rows * K / 8;
    for (int first = thread; first < pieces; first += 4 * THREADS) {
        uint4 four[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (first + j * THREADS < pieces) four[j] = load_fresh16(x + size_t(first + j * THREADS) * 16);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int i = first + j * THREADS, m = i / (K / 8), piece = i - m * (K / 8);
            if (i >= pieces) continue;
            uint32_t* to = reinterpret_cast<uint32_t*>(window + x_at + m * x_row_bytes + (piece >> 2) * 64) + (piece & 3);
            to[0] = four[j].x, to[4] = four[j].y, to[8] = four[j].z, to[12] = four[j].w;
        }
    }
    sync_block();

    const float* levels = reinterpret_cast<const float*>(window + MAP);
    const char* my_x[TILES];
#pragma unroll
    for (int n = 0; n < TILES; n++) my_x[n] = window + x_at + (n * 8 + g < rows ? n * 8 + g : 0) * x_row_bytes + t * 16;
    uint32_t this_stage = ring, bank = lane * 4;
    hold(bank);
    // NF4: nested absmax of the chunk after this one; absmax of a row before its first chunk
    float outer_low = 0, outer_high = 0;
    auto row_of = [&](int unit) { return AFFINE || unit >= units ? 0 : first_absmax(parts, unit, tiles) + g * tiles; };
    auto load_outer = [&](int at) {
        outer_low = load_global(nested + (at >> 8)), outer_high = load_global(nested + ((at + 8 * tiles) >> 8));
    };
    int row = row_of(blockIdx.x);
    if (!AFFINE && warp < chunks && blockIdx.x < units) load_outer(row + warp * 2);
    int round = 0;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x, round ^= 1) {
        const float offset = AFFINE ? 0 : part_of(parts, unit).offset;
        const int next_row = row_of(unit + gridDim.x);
        float sum[TILES][4] = {};
#pragma unroll 1
        for (int chunk = warp; chunk < chunks; chunk += WARPS) {
            copies_wait<STAGES - 2>();
            sync_warp();
            const char* stage = window + this_stage;
            this_stage = this_stage == ring + (STAGES - 1) * CHUNK_BYTES ? ring : this_stage + CHUNK_BYTES;
            const Codes read[2] = {Codes(stage, lane), Codes(stage + TILE_BYTES, lane)};
            uint32_t low_zero[2] = {}, high_zero[2] = {};
            float scale[2][2];
            if (AFFINE) {
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const int set = tile * SETS / 2;
                    const uint32_t both = *reinterpret_cast<const uint32_t*>(stage + CODE_BYTES + set * 32 + g * 4);
                    const uint32_t packed = *reinterpret_cast<const uint8_t*>(stage + ZEROS + set * 16 + g);
                    scale[tile][0] = to_float(both & 0xffff), scale[tile][1] = to_float(both >> 16);
                    low_zero[tile] = low_zero_of(packed), high_zero[tile] = high_zero_of(packed);
                }
            } else {
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const uint32_t both = *reinterpret_cast<const uint16_t*>(stage + CODE_BYTES + tile * 16 + g * 2);
                    const float low = WIDE_TABLE ? wide_level<0, TABLE>(both, bank) : levels[both & 255];
                    const float high = WIDE_TABLE ? wide_level<1, TABLE>(both, bank) : levels[both >> 8];
                    scale[tile][0] = low * outer_low + offset, scale[tile][1] = high * outer_high + offset;
                }
                load_outer(chunk + WARPS < chunks ? row + (chunk + WARPS) * 2 : next_row + warp * 2);
            }
            fetch();  // overwrites the stage before this one, which every lane has read
            float part[2][TILES][4] = {};
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                uint32_t words[4];
                read[tile].words(words);
                uint4 b[TILES][2];
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        b[n][i] = *reinterpret_cast<const uint4*>(my_x[n] + chunk * 256 + (tile * 2 + i) * 64);
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t a[4];
                    if (AFFINE) decode_affine(words[s], low_zero[tile], high_zero[tile], a);
                    else if (WIDE_TABLE) decode_nf4_wide<TABLE>(words[s], bank, a);
                    else decode_nf4<TABLE>(words[s], bank, a);
#pragma unroll
                    for (int n = 0; n < TILES; n++)
                        mma(part[tile][n], a, s & 1 ? b[n][s / 2].z : b[n][s / 2].x, s & 1 ? b[n][s / 2].w : b[n][s / 2].y);
                }
            }
#pragma unroll
            for (int tile = 0; tile < 2; tile++)
#pragma unroll
                for (int i = 0; i < 4 * TILES; i++) sum[i >> 2][i & 3] += part[tile][i >> 2][i & 3] * scale[tile][i >> 1 & 1];
        }
        row = next_row;
        float* partials = reinterpret_cast<float*>(window + PARTIALS + round * rows * ROW_PARTIALS);
#pragma unroll
        for (int i = 0; i < 4 * TILES; i++) {
            const int m = (i >> 2) * 8 + 2 * t + (i & 1);
            if (m < rows) partials[(m * WARPS + warp) * 16 + g + 8 * (i >> 1 & 1)] = sum[i >> 2][i & 3];
        }
        sync_block();
        const int m = (warp + unit) % WARPS;  // few rows: another warp adds each time
        if (m < rows) {
            const float* from = partials + m * WARPS * 16 + lane;
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS / 2; w++) total += from[w * 32];
            total += shuffle_xor(total, 16);
            const int column = unit * 16 + lane;
            if (lane < 16 && column < width)
                *reinterpret_cast<uint16_t*>(y + (size_t(m) * width + column) * 2) = to_pair(total, total) & 0xffff;
        }
    }
}
