// service/kernels/w4_linear/w4_few.cu with what w4_rows16.py asks of it:
//
//   AHEAD      NF4: nested absmax travel through the ring beside their chunk, where a load one chunk ahead brought them
#include "w4_device.h"

#ifndef AHEAD
#define AHEAD 0
#endif

#ifndef AFFINE
#define AFFINE 0
#endif
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
// chunk of the ring: codes 1024, then scales 32 and zeros 8, or absmax 2 x 16
constexpr int CHUNK_BYTES = AFFINE ? 1072 : AHEAD ? 1120 : 1056;  // AHEAD: nested absmax of 16 outputs
// addresses in shared memory; the first 1024 bytes are the system's
constexpr int MAP = 1024, TABLE = 2048, RING = AFFINE ? 1024 : TABLE + (WIDE_TABLE ? 65536 : 32768);
constexpr int PARTIALS = (RING + WARPS * STAGES * CHUNK_BYTES + 127) / 128 * 128;
constexpr int ROW_PARTIALS = WARPS * 64;  // bytes: [warp][16 outputs]; rows follow, and two rounds in turn
static_assert(WARPS % 2 == 0 && WARPS >= 8 * TILES && THREADS >= 256);

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

    // The chunk that is fetched next, its codes, and its place among the scales (two places a chunk for NF4); lanes 0 and
    // 1 copy scales or absmax, lane 2 zeros.
    constexpr int PLACES = AFFINE ? 1 : 2;
    const int turns = (chunks - warp + WARPS - 1) / WARPS;
    int next_unit = warp < chunks ? blockIdx.x : units, next_chunk = warp;
    const char* next_codes = codes + (size_t(next_unit) * chunks + warp) * 1024 + lane * 16;
    const size_t to_next_unit = size_t(gridDim.x) * chunks * 1024 - turns * WARPS * 1024;
    int next_place = warp * PLACES * units + next_unit;
    const char* side = AFFINE ? (lane < 2 ? scales + lane * 16 : zeros) : scales + lane * units * 16;
    const int side_bytes = !AFFINE ? 16 : lane < 2 ? 32 : 8;
    uint32_t next_stage = ring;
    auto absmax_of = [&](int unit) { return unit >= units ? 0 : first_absmax(parts, unit, tiles) + (lane & 15) * tiles + warp * 2; };
    int next_absmax = AFFINE || !AHEAD ? 0 : absmax_of(next_unit);
    auto fetch = [&]() {
        if (next_unit < units) {
            const uint32_t to = here + next_stage + lane * 16;
            copy16(to, next_codes);
            copy16(to + 512, next_codes + 512);
            const char* from = side + size_t(next_place) * side_bytes;
            if (lane < 2) copy16(to + 1024, from);
            if (AFFINE && lane == 2) copy8(to + 1024, from);
            if (!AFFINE && AHEAD) {
                if (lane < 16) copy4(here + next_stage + 1056 + lane * 4, nested + (next_absmax >> 8));
                next_absmax += WARPS * 2;
            }
            next_chunk += WARPS, next_codes += WARPS * 1024, next_place += WARPS * PLACES * units;
            if (next_chunk >= chunks) {
                next_chunk = warp, next_codes += to_next_unit, next_unit += gridDim.x;
                next_place = warp * PLACES * units + next_unit;
                if (!AFFINE && AHEAD) next_absmax = absmax_of(next_unit);
            }
        }
        copies_commit();
        next_stage = next_stage == ring + (STAGES - 1) * CHUNK_BYTES ? ring : next_stage + CHUNK_BYTES;
    };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) fetch();
    float value = 0;
    if (!AFFINE && AHEAD && !WIDE_TABLE && thread < 256) value = load_global(map + thread);
    release_successor();
    if (!AFFINE) {
        if (WIDE_TABLE) fill_wide_table(window + TABLE, map, thread, THREADS);
        else {
            fill_table(window + TABLE, thread, THREADS);
            if (AHEAD && thread < 256) reinterpret_cast<float*>(window + MAP)[thread] = value;
            for (int i = thread; i < (AHEAD ? 0 : 256); i += THREADS)
                reinterpret_cast<float*>(window + MAP)[i] = load_global(map + i);
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
    if (!AFFINE && !AHEAD && warp < chunks && blockIdx.x < units) load_outer(row + warp * 2);
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
            const uint4 word[2] = {*reinterpret_cast<const uint4*>(stage + lane * 16),
                                   *reinterpret_cast<const uint4*>(stage + 512 + lane * 16)};
            uint32_t low_zero = 0, high_zero = 0;
            float scale[2][2];
            if (AFFINE) {
                const uint32_t both = *reinterpret_cast<const uint32_t*>(stage + 1024 + g * 4);
                const uint32_t packed = *reinterpret_cast<const uint8_t*>(stage + 1056 + g);
                scale[0][0] = scale[1][0] = to_float(both & 0xffff), scale[0][1] = scale[1][1] = to_float(both >> 16);
                low_zero = low_zero_of(packed), high_zero = high_zero_of(packed);
            } else {
                if (AHEAD) {
                    outer_low = *reinterpret_cast<const float*>(stage + 1056 + g * 4);
                    outer_high = *reinterpret_cast<const float*>(stage + 1088 + g * 4);
                }
#pragma unroll
                for (int tile = 0; tile < 2; tile++) {
                    const uint32_t both = *reinterpret_cast<const uint16_t*>(stage + 1024 + tile * 16 + g * 2);
                    const float low = WIDE_TABLE ? wide_level<0, TABLE>(both, bank) : levels[both & 255];
                    const float high = WIDE_TABLE ? wide_level<1, TABLE>(both, bank) : levels[both >> 8];
                    scale[tile][0] = low * outer_low + offset, scale[tile][1] = high * outer_high + offset;
                }
                if (!AHEAD) load_outer(chunk + WARPS < chunks ? row + (chunk + WARPS) * 2 : next_row + warp * 2);
            }
            fetch();  // overwrites the stage before this one, which every lane has read
            float part[2][TILES][4] = {};
#pragma unroll
            for (int tile = 0; tile < 2; tile++) {
                const uint32_t words[4] = {word[tile].x, word[tile].y, word[tile].z, word[tile].w};
                uint4 b[TILES][2];
#pragma unroll
                for (int n = 0; n < TILES; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        b[n][i] = *reinterpret_cast<const uint4*>(my_x[n] + chunk * 256 + (tile * 2 + i) * 64);
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    uint32_t a[4];
                    if (AFFINE) decode_affine(words[s], low_zero, high_zero, a);
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
