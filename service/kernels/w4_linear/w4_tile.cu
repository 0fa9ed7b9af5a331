// W4 linear: wgmma with the dequantized weights as the register operand. Computes y^T = W x^T, so that weights are the
// 64-row side and R outputs x T rows of activations are a tile; layout of weights: layout.py.
//
//   producer (one thread): x [T][64 K] boxes under the 128-byte swizzle and codes [R/16][TILE_BYTES * KS] boxes through
//       tensor maps, scales (and zeros) of R outputs as plain bulk copies, into STAGES stages of KS * 64 K; the first
//       STAGES stages of weights before it waits for the kernel that writes x
//   WGS consumer warpgroups: 64 * RT outputs each, a warp 16 of every 64. It reads its tile of codes (16 bytes a lane,
//       or 12) and decodes the next 64 of K into one set of fragments while the tensor cores work on the other set.
//
// Work: one block a multiprocessor, all at once. Tiles fill rounds of the grid; what is left is cut by K, one of two ways:
//   few tiles       each into as many equal shares as there are blocks for; every share leaves its sums in the workspace
//                   and then adds up some of the tile's
//   STRETCHED       laid end to end, every block takes an equal stretch, to 128 of K. It begins inside a tile, whose sums it
//                   leaves, and ends with a tile's first units, whose sums it keeps and adds the rest of that tile to, which
//                   its neighbour finished long before
// Parts are added in the order of K, so bits do not depend on the run. Flags tell who has left its sums; an idle warp
// raises and awaits them beside the consumers. A flag counts launches: a launch that cuts raises each by one, so nothing
// is reset, and a captured graph can be replayed. All launches on one workspace have the same grid and follow each other
// on one stream.
#include "w4_device.h"

#ifndef TILE
#define TILE 64
#endif
#ifndef RT
#define RT 1
#endif
#ifndef WGS
#define WGS 4
#endif
#ifndef KS
#define KS 2
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef PER_SM
#define PER_SM 1
#endif
#ifndef WIDE_TABLE  // NF4's table has entries 256 bytes apart, 64 KiB: fewer instructions, less room for stages
#define WIDE_TABLE 0
#endif
#ifndef STRETCHED  // tiles are laid end to end and cut alike for all blocks; else each into as many shares as there are blocks
#define STRETCHED 0
#endif
#ifndef SCALED_SUMS  // scales are applied to the sums of 64 of K in float32, not to the weights
#define SCALED_SUMS 0
#endif
constexpr int T = TILE, R = 64 * RT * WGS, J = T / 8, WARPS = WGS * 4, CONSUMERS = WARPS * 32, THREADS = CONSUMERS + 128;
constexpr int MOST_SHARES = 8, PIECES = RT * J;  // pieces of a warp: 8 rows of 16 outputs, 16 bytes a lane
constexpr int LOADS = WGS == 4 || PER_SM == 2 ? 8 : 16, SHARES_AT_ONCE = 4, ITEMS = LOADS / SHARES_AT_ONCE;  // in flight a thread
constexpr int UNIT = 2 / KS;  // steps of the 128 K in which work is dealt
constexpr int STAGE_SETS = GROUP == 64 ? KS : 1;  // of scales for a stage
constexpr int X_BYTES = T * 128, CODE_BYTES = R / 16 * TILE_BYTES * KS;
constexpr int SET_BYTES = AFFINE ? R * 2 : R, SCALE_BYTES = SET_BYTES * STAGE_SETS;
constexpr int ZERO_BYTES = AFFINE ? R / 2 * STAGE_SETS : 0;
constexpr int CODES = KS * X_BYTES, SCALES = CODES + CODE_BYTES, ZEROS = SCALES + SCALE_BYTES;
constexpr int STAGE_BYTES = (ZEROS + ZERO_BYTES + 1023) / 1024 * 1024;
// addresses in shared memory; the first 1024 bytes are the system's
constexpr int OUT_ROWS = T < 16 ? T : 16, OUT_BYTES = OUT_ROWS * 32;
constexpr int FULL = 1024, EMPTY = FULL + 8 * STAGES, MAP = 1280, OUT = AFFINE ? MAP : MAP + 1024;
constexpr int TABLE = (OUT + WARPS * OUT_BYTES + 1023) / 1024 * 1024;
constexpr int RING = TABLE + (AFFINE ? 0 : WIDE_TABLE ? 65536 : 32768), END = RING + STAGES * STAGE_BYTES;
static_assert(STAGES * 16 <= 256 && END * PER_SM <= 232448 + 1024);
// of a thread; together no more than the launch gives, 65536 / PER_SM / THREADS down to eights for everyone
constexpr int CONSUMER_REGISTERS = PER_SM == 2 ? (WGS == 1 ? 216 : 104) : WGS == 4 ? 112 : WGS == 3 ? 152 : 232;
constexpr int PRODUCER_REGISTERS = PER_SM == 2 ? (WGS == 1 ? 40 : 32) : WGS == 4 ? 32 : WGS == 3 ? 56 : 40;
static_assert(PER_SM == 2 ? WGS <= 2 : WGS >= 2 && WGS <= 4);
static_assert(X_BYTES % 1024 == 0 && CODE_BYTES % 128 == 0);

#ifdef SHARED_BYTES
static_assert(SHARED_BYTES == END - 1024);  // what the host asks for
#endif

#include "w4_work.h"

// A scale as factor of a pair of weights. bfloat16: in two parts, so that a product is rounded once.
struct Factor {
    uint32_t pair;
#if BF16
    uint32_t rest;
#endif
};
DEVICE Factor factor_of(float scale) {
#if BF16
    const uint32_t pair = to_pair(scale, scale);
    const float rest = scale - bits_to_float(pair << 16);
    return {pair, to_pair(rest, rest)};
#else
    return {to_pair(scale, scale)};
#endif
}
DEVICE uint32_t scaled(uint32_t weights, Factor factor) {
#if BF16
    return multiply_add(weights, factor.pair, multiply(weights, factor.rest));
#else
    return multiply(weights, factor.pair);
#endif
}

// N: outputs as packed, a multiple of 32; width: of them in y, a multiple of 8. K: a multiple of 128.
// workspace: float32 [gridDim.x][R * T]; flags: uint32 [gridDim.x], zero before the first launch.
KERNEL __launch_bounds__(THREADS, PER_SM)
w4_tile(GRID_CONSTANT TensorMap x_map, GRID_CONSTANT TensorMap code_map, const char* __restrict__ scales,
        const char* __restrict__ zeros, const float* __restrict__ nested, const float* __restrict__ map,
        char* __restrict__ y, float* workspace, uint32_t* flags, int rows, int N, int width, int K,
        GRID_CONSTANT Parts parts) {
    SHARED_MEMORY
    const uint32_t here = window_start(shared);
    char* window = shared - 1024;
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, block = blockIdx.x;
    const int row_tiles = (rows + T - 1) / T;
    Work work((N + R - 1) / R * row_tiles, K / 128, block, gridDim.x);

    if (thread == CONSUMERS) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(here + FULL + 8 * i, 1);
            barrier_init(here + EMPTY + 8 * i, WARPS);
        }
        barriers_visible();
    }
    release_successor();
    sync_block();

    if (warp >= WARPS) {
        registers_lower<PRODUCER_REGISTERS>();
        if (thread == CONSUMERS) {
            auto fetch_weights = [&](const Cursor& at, int stage) {
                const uint32_t full = here + FULL + 8 * stage, to = here + RING + stage * STAGE_BYTES;
                const int outputs = N - at.n < R ? N - at.n : R;
                const int side = AFFINE ? outputs * 5 / 2 : outputs;
                barrier_expect(full, KS * X_BYTES + CODE_BYTES + side * STAGE_SETS);
                const uint64_t kept = row_tiles == 1 ? READ_ONCE : KEEP;
                copy_box(to + CODES, &code_map, at.step * KS * (TILE_BYTES / 4), at.n / 16, full, kept);
#pragma unroll
                for (int i = 0; i < STAGE_SETS; i++) {
                    const size_t from = size_t(at.step * KS * 64 / GROUP + i) * N + at.n;
                    if (AFFINE) {
                        copy_bulk(to + SCALES + i * SET_BYTES, scales + from * 2, outputs * 2, full);
                        copy_bulk(to + ZEROS + i * (R / 2), zeros + from / 2, outputs / 2, full);
                    } else {
                        copy_bulk(to + SCALES + i * SET_BYTES, scales + from, outputs, full);
                    }
                }
            };
            auto fetch_x = [&](const Cursor& at, int stage) {
                const uint32_t to = here + RING + stage * STAGE_BYTES;
#pragma unroll
                for (int i = 0; i < KS; i++)
                    copy_box(to + i * X_BYTES, &x_map, (at.step * KS + i) * 64, at.m, here + FULL + 8 * stage, KEEP);
            };
            Cursor ahead(work, row_tiles), at(work, row_tiles);
            int fetched = 0;
            while (fetched < STAGES && ahead.next()) fetch_weights(ahead, fetched++);
            await_predecessor();
            for (int i = 0; i < fetched; i++) at.next(), fetch_x(at, i);
            uint32_t stage = 0, phase = 0;
            if (fetched == STAGES)
                while (at.next()) {
                    barrier_wait(here + EMPTY + 8 * stage, phase);
                    fetch_weights(at, stage);
                    fetch_x(at, stage);
                    if (++stage == STAGES) stage = 0, phase ^= 1;
                }
        }
        if (warp == WARPS + 1 && work.total > 0) {
            await_predecessor();
            const uint32_t mark = flag_value(flags + block) + 1;  // of this launch
            sync_warp();
            if (work.is_heard()) sync_named<1, CONSUMERS + 32>();
            if (lane == 0) fence_device(), flag_publish(flags + block, mark);
            const int others = work.num_heard(block), first = STRETCHED ? block + 1 : block / work.shares * work.shares;
            for (int i = lane; i < others; i += 32) flag_await(flags + first + i, mark);
            sync_warp();
            if (others > 0) arrive_named<2, CONSUMERS + 32>();
        }
        return;
    }

    registers_raise<CONSUMER_REGISTERS>();
    if (!AFFINE) {
        if (WIDE_TABLE) fill_wide_table(window + TABLE, map, thread, CONSUMERS);
        else {
            fill_table(window + TABLE, thread, CONSUMERS);
            for (int i = thread; i < 256; i += CONSUMERS) reinterpret_cast<float*>(window + MAP)[i] = load_global(map + i);
        }
        sync_named<3, CONSUMERS>();
    }
    const int g = lane >> 2, group = warp >> 2, quarter = warp & 3, all_tiles = K / 64;
    uint32_t bank = lane * 4;
    hold(bank);
    const float* levels = reinterpret_cast<const float*>(window + MAP);
    uint32_t stage = 0, phase = 0, done = 0;  // `done`: the stage given back next
    float sum[RT][J * 4], part[SCALED_SUMS ? 2 : 1][RT][J * 4];
    float scale[2][RT][2];
    uint32_t set[2][RT][4][4], zero[RT][2];
    float outer[RT][2], offset[RT];
    int absmax_at[RT];

    auto give_back = [&]() {
        if (lane == 0) barrier_arrive(here + EMPTY + 8 * done);
        if (++done == STAGES) done = 0;
    };
    // Codes of 64 K -> fragments; their scales are applied here, or left in `scales_here`.
    auto decode = [&](int k_tile, int i, bool is_first, uint32_t (*fragments)[4][4], float (*scales_here)[2]) {
        const char* from = window + RING + stage * STAGE_BYTES;
#pragma unroll
        for (int r = 0; r < RT; r++) {
            const int place = (group * RT + r) * 4 + quarter;
            const Codes read(from + CODES + (place * KS + i) * TILE_BYTES, lane);
            if (AFFINE) {
                if (i < STAGE_SETS) {
                    const char* scales_at = from + SCALES + i * SET_BYTES + place * 32;
                    const uint32_t both = *reinterpret_cast<const uint32_t*>(scales_at + g * 4);
                    const uint32_t packed = *reinterpret_cast<const uint8_t*>(from + ZEROS + i * (R / 2) + place * 8 + g);
                    scales_here[r][0] = to_float(both & 0xffff), scales_here[r][1] = to_float(both >> 16);
                    zero[r][0] = low_zero_of(packed), zero[r][1] = high_zero_of(packed);
                } else {
                    scales_here[r][0] = scale[0][r][0], scales_here[r][1] = scale[0][r][1];
                }
            } else {
                const uint32_t both = *reinterpret_cast<const uint16_t*>(from + SCALES + i * SET_BYTES + place * 16 + g * 2);
                const int low = absmax_at[r] + k_tile, high = low + 8 * all_tiles;
                if (is_first || (low & 255) == 0) outer[r][0] = load_global(nested + (low >> 8));
                if (is_first || (high & 255) == 0) outer[r][1] = load_global(nested + (high >> 8));
                const float low_level = WIDE_TABLE ? wide_level<0, TABLE>(both, bank) : levels[both & 255];
                const float high_level = WIDE_TABLE ? wide_level<1, TABLE>(both, bank) : levels[both >> 8];
                scales_here[r][0] = low_level * outer[r][0] + offset[r];
                scales_here[r][1] = high_level * outer[r][1] + offset[r];
            }
            const Factor low = factor_of(scales_here[r][0]), high = factor_of(scales_here[r][1]);
            uint32_t words[4];
            read.words(words);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                uint32_t* a = fragments[r][s];
                if (AFFINE) decode_affine(words[s], zero[r][0], zero[r][1], a);
                else if (WIDE_TABLE) decode_nf4_wide<TABLE>(words[s], bank, a);
                else decode_nf4<TABLE>(words[s], bank, a);
                if (!SCALED_SUMS) {
                    a[0] = scaled(a[0], low), a[1] = scaled(a[1], high);
                    a[2] = scaled(a[2], low), a[3] = scaled(a[3], high);
                }
            }
        }
    };
    auto add_part = [&](float (*from)[J * 4], float (*by)[2]) {
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int i = 0; i < J * 4; i++) hold(from[r][i]), sum[r][i] += from[r][i] * by[r][i >> 1 & 1];
    };
    // Substep `at` of a stretch, its `odd` known to the compiler; 64 of K.
    auto substep = [&](int at, int odd, int first_tile) {
        const int i = KS == 2 ? odd : 0;
        if (i == 0) barrier_wait(here + FULL + 8 * stage, phase);
        decode(first_tile + at, i, at == 0, set[odd], scale[odd]);
        const uint64_t x = descriptor(here + RING + stage * STAGE_BYTES + i * X_BYTES);
        wgmma_fence();
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int s = 0; s < 4; s++)
                if (SCALED_SUMS) wgmma<T>(part[SCALED_SUMS ? odd : 0][r], set[odd][r][s], x + 2 * s, s > 0);
                else wgmma<T>(sum[r], set[odd][r][s], x + 2 * s, at > 0 || s > 0);
        wgmma_commit();
        if (i == KS - 1)
            if (++stage == STAGES) stage = 0, phase ^= 1;
        wgmma_wait<1>();  // the one before this is over: its fragments and its stage are free
        if (SCALED_SUMS && at > 0) add_part(part[SCALED_SUMS ? 1 - odd : 0], scale[1 - odd]);
        if (i == 0 && at > 0) give_back();
    };

    // [16 outputs][8 rows of activations] pieces, transposed in the warp's own shared memory: 32 bytes a row
    const uint32_t out = OUT + warp * OUT_BYTES;
    auto stage_piece = [&](int row, const float* v) {
        const int at = row + (lane & 7);
        store_two_transposed(here + out + at * 32 + (((lane >> 3) ^ (at >> 2)) & 1) * 16, to_pair(v[0], v[1]), to_pair(v[2], v[3]));
    };
    auto write_rows = [&](int count, int row, int column) {
        sync_warp();
        if (lane < count * 2) {
            const int at = lane >> 1, half = lane & 1;
            const uint4 v = *reinterpret_cast<const uint4*>(window + out + at * 32 + ((half ^ (at >> 2)) & 1) * 16);
            if (row + at < rows && column + half * 8 < width)
                *reinterpret_cast<uint4*>(y + (size_t(row + at) * width + column + half * 8) * 2) = v;
        }
        sync_warp();
    };

    auto write_sums = [&](int n, int m) {
#pragma unroll
        for (int r = 0; r < RT; r++) {
            const int column = n + (group * RT + r) * 64 + quarter * 16;
#pragma unroll
            for (int j = 0; j < J; j++) {
                stage_piece(j * 8 % OUT_ROWS, &sum[r][j * 4]);
                if ((j + 1) * 8 % OUT_ROWS == 0) write_rows(OUT_ROWS, m + (j + 1) * 8 - OUT_ROWS, column);
            }
        }
    };

    const int others = work.num_heard(block);
    int n = 0, m = 0;
    Stretch s;
    while (work.next(s)) {
        n = s.tile / row_tiles * R, m = s.tile % row_tiles * T;
#pragma unroll
        for (int r = 0; r < RT; r++) {
            const int row_block = n / 16 + (group * RT + r) * 4 + quarter;
            absmax_at[r] = AFFINE || row_block * 16 >= N ? 0 : first_absmax(parts, row_block, all_tiles) + g * all_tiles;
            offset[r] = AFFINE ? 0 : part_of(parts, row_block).offset;
            if (!AFFINE) hold(offset[r]);  // in a register, not selected anew for every step
            if (SCALED_SUMS) {
#pragma unroll
                for (int i = 0; i < J * 4; i++) sum[r][i] = 0;
            }
        }
        for (int at = 0; at < s.units * 2; at += 2) {
            substep(at, 0, s.first * 2);
            substep(at + 1, 1, s.first * 2);
        }
        wgmma_wait<0>();
        if (SCALED_SUMS) add_part(part[SCALED_SUMS ? 1 : 0], scale[1]);
        give_back();

        await_predecessor();  // which may still read y, or add its own parts
        if (s.units == work.tile_units) {
            write_sums(n, m);
        } else if (!STRETCHED || s.first > 0) {
            float* to = workspace + size_t(block) * (R * T) + thread * 4;
#pragma unroll
            for (int i = 0; i < PIECES; i++) {
                const float* v = &sum[i / J][i % J * 4];
                store_partial(to + i * CONSUMERS * 4, make_float4(v[0], v[1], v[2], v[3]));
            }
            arrive_named<1, CONSUMERS + 32>();
        }
    }
    // What is added up comes last, and outside of the loop: divergent branches inside would make a warp's stage, phase and
    // descriptors its threads'.
    if (others == 0) return;
    sync_named<2, CONSUMERS + 32>();
    if (STRETCHED) {  // `sum` has the tile's first units
        const float* from = workspace + size_t(block + 1) * (R * T) + thread * 4;
#pragma unroll 1
        for (int i = 0; i < others; i++, from += R * T) {
#pragma unroll
            for (int begin = 0; begin < PIECES; begin += LOADS) {
                float4 v[LOADS];
#pragma unroll
                for (int piece = 0; piece < LOADS && begin + piece < PIECES; piece++)
                    v[piece] = load_partial(from + (begin + piece) * CONSUMERS * 4, true);
#pragma unroll
                for (int piece = 0; piece < LOADS && begin + piece < PIECES; piece++) {
                    float* to = &sum[(begin + piece) / J][(begin + piece) % J * 4];
                    to[0] += v[piece].x, to[1] += v[piece].y, to[2] += v[piece].z, to[3] += v[piece].w;
                }
            }
        }
        write_sums(n, m);
        return;
    }
    // every share adds some of the tile's pieces, shares in the order of K
    const int rank = block % work.shares, step = work.shares * WARPS;
    const float* base = workspace + size_t(block - rank) * (R * T) + lane * 4;
#pragma unroll 1
    for (int first = rank + warp * work.shares; first < PIECES * WARPS; first += step * ITEMS) {
        float total[ITEMS][4] = {};
#pragma unroll 1
        for (int share = 0; share < work.shares; share += SHARES_AT_ONCE) {
            float4 v[ITEMS][SHARES_AT_ONCE];
#pragma unroll
            for (int i = 0; i < ITEMS; i++)
#pragma unroll
                for (int j = 0; j < SHARES_AT_ONCE; j++)
                    v[i][j] = load_partial(base + (first + i * step) * 128 + size_t(share + j) * (R * T),
                                           first + i * step < PIECES * WARPS && share + j < work.shares);
#pragma unroll
            for (int i = 0; i < ITEMS; i++)
#pragma unroll
                for (int j = 0; j < SHARES_AT_ONCE; j++)
                    total[i][0] += v[i][j].x, total[i][1] += v[i][j].y, total[i][2] += v[i][j].z, total[i][3] += v[i][j].w;
        }
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const int item = first + i * step, from_warp = item % WARPS, piece = item / WARPS;
            if (item >= PIECES * WARPS) continue;
            stage_piece(0, total[i]);
            write_rows(8, m + piece % J * 8, n + ((from_warp >> 2) * RT + piece / J) * 64 + (from_warp & 3) * 16);
        }
    }
}
