// A decode's attention in one launch: norms and rotary embedding of q and k, K and V of the new token into their page,
// attention over the pages of [block][kv head][16 tokens][DIM], and the sum of what several blocks have found.
//
// A cluster of SPLITS blocks serves one sequence and KV head, its GROUP query heads are the narrow side of mma.m16n8k16:
// S^T = K q^T has 16 tokens, a page, on the wide one, O^T = V^T P^T 16 dimensions. Warps are on their own: each takes every
// (WARPS * SPLITS)-th page, copies it into a ring of STAGES pages of its own and keeps its own softmax, in float32 and powers
// of two. Only at the end do the warps of a block, then the blocks of a cluster add up, in the order of their numbers: one
// input has one result. Everything that depends on a length is found here, nothing on the host.
//
// Before the wait for the predecessor a block reads lengths, block tables and pages. What writes those:
//   lengths and tables   the first kernel of this step (row_state), or a copy from the host before it
//   pages                this kernel in an earlier step, or kernels/rotary_kv with prompts. The page of the new token is read
//                        too, but of its row, which this launch writes, nothing is used: it is put into the copy
// All of them are over, although the kernels before this one may all release their successors before they wait. A step's
// layers come behind its embedding, which torch launches plainly, as it does copies: it begins when everything before it is
// over, and what comes behind begins when it is. In a step with prompts kernels/rotary_kv stands between: it writes pages of
// prompts, which none that decodes here reads, and, where the step is captured, the rows of new tokens, of which nothing is
// used here before the wait, and which this launch writes once more.
#include "operands.h"
#include "rows.h"

DEVICE float minus_infinity() { return bits_to_float(0xff800000); }
DEVICE float over_tokens(float v, bool is_sum) {  // of lanes with the same heads
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
        const float other = shuffle_xor(v, mask);
        v = is_sum ? v + other : fmaxf(v, other);
    }
    return v;
}
// Four dimensions of a head, of those of COUNT parts that have seen a key; a part's state is its highest score and its sum of
// weights under it. -> the same of all.
template <int COUNT, class State, class Numbers>
DEVICE float4 add(State state, Numbers numbers, float& top, float& weight) {
    float4 v = make_float4(0, 0, 0, 0);
    top = -3.4e38f, weight = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) top = fmaxf(top, state(i).x);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float2 of = state(i);
        if (of.x == minus_infinity() && of.y == 0) continue;  // but not what is broken: it has to show
        const float4 u = numbers(i);
        const float by = power_of_2(of.x - top);
        weight += by * of.y;
        v.x += by * u.x, v.y += by * u.y, v.z += by * u.z, v.w += by * u.w;
    }
    return v;
}

// qkv [S][(GROUP + 2) * kv_heads][DIM]; y [S][GROUP * kv_heads][DIM]; cosines and sines float32 [positions][DIM] or null;
// norms [DIM] or null; scale_pages bfloat16 [block][kv head][16][2] or, without CODES, null; tables [S][table_width]; one
// block for each sequence, KV head and split.
KERNEL __launch_bounds__(THREADS, PER_SM) IN_CLUSTERS
decode_attention(GRID_CONSTANT TensorMap key_map, GRID_CONSTANT TensorMap value_map, const char* qkv, char* __restrict__ y,
                 const float* __restrict__ cosines, const float* __restrict__ sines, const char* __restrict__ q_norm,
                 const char* __restrict__ k_norm, char* key_pages, char* value_pages, char* scale_pages,
                 const int* __restrict__ tables, const int* __restrict__ lengths, int table_width, int kv_heads, int window,
                 float scale, float softcap, float eps) {
    SHARED_MEMORY
    constexpr float LOG2_E = 1.4426950408889634f;
    const float nothing = minus_infinity();
    const uint32_t here = shared_address(shared);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, block = blockIdx.x;
    const int split = block % SPLITS, sequence = block / SPLITS / kv_heads, kv_head = block / SPLITS % kv_heads;
    const int mine = warp * SPLITS + split;  // this warp's first page; a short sequence's lie on several multiprocessors
    const int* table = tables + size_t(sequence) * table_width;

    // lane i knows the block of the warp's page `known` + i; asked for before the length is there
    auto look_up = [&](int first) {
        const int page = mine + (first + lane) * STRIDE;
        return page < table_width ? table[page] : 0;
    };
    int known = 0, known_block = look_up(0);
    const int length = lengths[sequence];
    if (thread == 0) {
        if ((here & 1023) != 0) stop();
        prefetch_map(&key_map), prefetch_map(&value_map);
    }
    const uint32_t full = here + warp * STAGES * 8, ring = here + RING + warp * WARP_BYTES;
    const uint32_t scales = here + SCALES + warp * STAGES * SCALE_BYTES;
    if (lane == 0) {
        for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1);
        if (SPLITS > 1 && warp == 0) barrier_init(here + RECEIVED, 1);
        barriers_visible();
    }
    sync_warp();
    if (SPLITS > 1) cluster_arrive_begun();

    const int oldest = window > 0 && length > window ? length - window : 0;  // token
    const int first_page = oldest / PAGE, num_pages = (length + PAGE - 1) / PAGE, last_page = num_pages - 1;
    const int begin = first_page > mine ? (first_page - mine + STRIDE - 1) / STRIDE : 0;
    const int end = num_pages > mine ? (num_pages - mine + STRIDE - 1) / STRIDE : 0;
    if (begin > 0) known = begin, known_block = look_up(begin);
    auto fetch = [&](int stage) {  // the page of the lane that does it
        const uint32_t barrier = full + 8 * stage, to = ring + stage * STAGE_BYTES;
        const int row = (known_block * kv_heads + kv_head) * PAGE;
        barrier_expect(barrier, STAGE_BYTES + SCALE_BYTES);
#pragma unroll
        for (int i = 0; i < BOXES; i++) copy_box(to + i * BOX_BYTES, &key_map, i * BOX_DIMS, row, barrier, READ_ONCE);
#pragma unroll
        for (int i = 0; i < BOXES; i++)
            copy_box(to + PAGE_BYTES + i * BOX_BYTES, &value_map, i * BOX_DIMS, row, barrier, READ_ONCE);
        if (CODES) copy_bulk(scales + stage * SCALE_BYTES, scale_pages + size_t(row) * 4, SCALE_BYTES, barrier);
    };
    if (lane < STAGES && begin + lane < end) fetch(lane);
    int later_block = begin + 32 < end ? look_up(begin + 32) : 0;
    release_successor();  // it reads nothing of ours before it has waited

    // whoever rotates a piece of some head does so of all its heads
    const int piece = thread % LANES, position = length > 0 ? length - 1 : 0;
    const bool is_piece = piece < PIECES, rotates = cosines != nullptr;
    Angles angles;
    if (rotates && is_piece) {
        const size_t at = size_t(position) * DIM + piece * 8;
        load_floats(angles.left_cos, cosines + at), load_floats(angles.right_cos, cosines + at + DIM / 2);
        load_floats(angles.left_sin, sines + at), load_floats(angles.right_sin, sines + at + DIM / 2);
    }
    const bool is_owner = length > 0 && last_page % SPLITS == split;  // of the page of the new token
    const int fresh_row = position % PAGE, fresh_block = is_owner ? table[last_page] : 0;
    for (int i = thread; i < (HEADS - GROUP) * (Q_BYTES / 16); i += THREADS)
        *reinterpret_cast<uint4*>(shared + Q + GROUP * Q_BYTES + i * 16) = make_uint4(0, 0, 0, 0);

    await_predecessor();
    const int num_rows = is_owner ? GROUP + 2 : GROUP;  // q's heads, k, v
    for (int first = 0; first < num_rows; first += ROWS_AT_ONCE) {
        const int row = first + thread / LANES;
        const bool is_wanted = is_piece && row < num_rows;
        const int head = row < GROUP ? kv_head * GROUP + row : row * kv_heads + kv_head;
        uint4 left = make_uint4(0, 0, 0, 0), right = left;
        if (is_wanted) {
            const char* from = qkv + (size_t(sequence) * (GROUP + 2) * kv_heads + head) * (2 * DIM) + piece * 16;
            left = load_fresh16(from), right = load_fresh16(from + DIM);
        }
        if (NORMED) {
            const char* weights = row < GROUP ? q_norm : k_norm;
            norm(left, right, is_wanted && row <= GROUP ? weights + piece * 16 : nullptr, eps);
        }
        if (rotates && row <= GROUP && is_piece) rotate(left, right, angles);
        const uint32_t largest = CODES ? largest_of(left, right) : 0;
        if (!is_wanted) continue;
        if (row < GROUP) {
            char* to = shared + Q + row * Q_BYTES;
            if (CODES && BF16) {
                const float divisor = divide(left, right, largest);
                if (piece == 0) *reinterpret_cast<float*>(to + 2 * DIM) = divisor;
            }
            *reinterpret_cast<uint4*>(to + piece * 16) = left, *reinterpret_cast<uint4*>(to + piece * 16 + DIM) = right;
            continue;
        }
        const bool is_value = row > GROUP;
        const size_t kept_row = (size_t(fresh_block) * kv_heads + kv_head) * PAGE + fresh_row;
        char* kept = (is_value ? value_pages : key_pages) + kept_row * ROW_BYTES + piece * 8 * NUMBER_BYTES;
        char* to = shared + FRESH + is_value * ROW_BYTES + piece * 8 * NUMBER_BYTES;
        if (CODES) {
            uint2 left_codes, right_codes;
            const uint16_t scale_bits = quantize(left_codes, right_codes, left, right, largest);
            *reinterpret_cast<uint2*>(to) = left_codes, *reinterpret_cast<uint2*>(to + DIM / 2) = right_codes;
            *reinterpret_cast<uint2*>(kept) = left_codes, *reinterpret_cast<uint2*>(kept + DIM / 2) = right_codes;
            if (piece == 0) {
                *reinterpret_cast<uint16_t*>(shared + FRESH + 2 * ROW_BYTES + is_value * 2) = scale_bits;
                *reinterpret_cast<uint16_t*>(scale_pages + kept_row * 4 + is_value * 2) = scale_bits;
            }
        } else {
            *reinterpret_cast<uint4*>(to) = left, *reinterpret_cast<uint4*>(to + DIM) = right;
            *reinterpret_cast<uint4*>(kept) = left, *reinterpret_cast<uint4*>(kept + DIM) = right;
        }
    }
    sync_block();

    const int g = lane >> 2, t = lane & 3;
    uint32_t q[TILES][2 * STEPS];  // operand B: 8 heads, 16 dimensions a step
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2 * STEPS; i++) {
            const int pair = CODES ? (i >> 1) * 8 + t * 2 + (i & 1) : i * 4 + t;  // neighbours of its pair in the page
            q[n][i] = *reinterpret_cast<const uint32_t*>(shared + Q + (n * 8 + g) * Q_BYTES + pair * 4);
        }
    const Places at = places_of(lane);
    float sum[TILES][STEPS][4] = {}, total[TILES][2] = {}, highest[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++) highest[n][0] = highest[n][1] = nothing;
    float factors[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            factors[n][i] = CAPPED ? scale * 2 * LOG2_E / softcap : scale * LOG2_E;
            if (CODES && BF16)
                factors[n][i] *= *reinterpret_cast<const float*>(shared + Q + (n * 8 + 2 * t + i) * Q_BYTES + 2 * DIM);
        }

    uint32_t stage = 0, phase = 0;
    for (int k = begin; k < end; k++) {
        const int page = mine + k * STRIDE, token = page * PAGE;
        const uint32_t keys = ring + stage * STAGE_BYTES, values = keys + PAGE_BYTES;
        barrier_wait(full + 8 * stage, phase);
        if (page == last_page || (!CODES && token < oldest)) {
            char* box = shared + RING + warp * WARP_BYTES + stage * STAGE_BYTES;
            constexpr int COLUMNS = ROW_BYTES / 16;
            for (int i = lane; i < PAGE * COLUMNS; i += 32) {
                const int row = i / COLUMNS, column = i % COLUMNS;
                char* to = box + (column >> 3) * BOX_BYTES + row * 128 + ((column ^ row) & 7) * 16;
                if (page == last_page && row == fresh_row) {
                    const char* from = shared + FRESH + column * 16;
                    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
                    *reinterpret_cast<uint4*>(to + PAGE_BYTES) = *reinterpret_cast<const uint4*>(from + ROW_BYTES);
                } else if (!CODES && (token + row < oldest || token + row >= length))
                    // what lies there may be anything, weights of zero would not make it nothing; codes are finite
                    *reinterpret_cast<uint4*>(to + PAGE_BYTES) = make_uint4(0, 0, 0, 0);
            }
            if (CODES && lane == 0)
                *reinterpret_cast<uint32_t*>(shared + SCALES + (warp * STAGES + stage) * SCALE_BYTES + fresh_row * 4) =
                    *reinterpret_cast<const uint32_t*>(shared + FRESH + 2 * ROW_BYTES);
            fence_copies();
            sync_warp();
        }

        float scores[TILES][2][4] = {};  // even and odd steps, so that no product waits for the one before it
        each_step<false>(keys, at, [&](int i, const uint32_t* a) {
#pragma unroll
            for (int n = 0; n < TILES; n++) multiply(scores[n][i & 1], a, q[n][2 * i], q[n][2 * i + 1]);
        });
        // of the lane's two tokens; a score counts with log2 of V's scale, so that weights times scales are 1 at most
        bool is_seen[2];
        float key_scale[2] = {1, 1}, value_scale[2] = {1, 1}, value_log[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = g + 8 * i;
            is_seen[i] = token + row >= oldest && token + row < length;
            if (CODES) {
                const uint32_t both = *reinterpret_cast<const uint32_t*>(
                    shared + SCALES + (warp * STAGES + stage) * SCALE_BYTES + row * 4);
                key_scale[i] = bits_to_float(both << 16);
                value_scale[i] = is_seen[i] ? bits_to_float(both & 0xffff0000) : 0;
                // exponent, and mantissa as if it were its own logarithm: within 0.09. A scale that is broken or as good as
                // that must not make weights of nothing, or it would not show: 2^-128 is 0 to the GPU's power
                value_log[i] = fminf(float(both >> 16) * (1.0f / 128) - 127, 100);
            }
        }
        uint32_t weights[TILES][2];
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            float s[4], shrink[2];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[i] = (scores[n][0][i] + scores[n][1][i]) * factors[n][i & 1];
                if (CODES) s[i] *= key_scale[i >> 1];
                if (CAPPED) s[i] = softcap * LOG2_E - 2 * softcap * LOG2_E / (power_of_2(s[i]) + 1);
                s[i] = is_seen[i >> 1] ? s[i] : nothing;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {  // the lane's two heads
                const float found = CODES ? fmaxf(s[i] + value_log[0], s[i + 2] + value_log[1]) : fmaxf(s[i], s[i + 2]);
                const float now = fmaxf(highest[n][i], over_tokens(found, false));
                shrink[i] = power_of_2(highest[n][i] - now), highest[n][i] = now;
                s[i] = power_of_2(s[i] - now), s[i + 2] = power_of_2(s[i + 2] - now);
                total[n][i] = total[n][i] * shrink[i] + s[i] + s[i + 2];
            }
#pragma unroll
            for (int i = 0; i < STEPS; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) sum[n][i][j] *= shrink[j & 1];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float a = s[2 * i], b = s[2 * i + 1];
                weights[n][i] = transposed(CODES ? to_halves(a * value_scale[i], b * value_scale[i]) : to_pair(a, b));
            }
        }
        each_step<true>(values, at, [&](int i, const uint32_t* a) {
#pragma unroll
            for (int n = 0; n < TILES; n++) multiply(sum[n][i], a, weights[n][0], weights[n][1]);
        });

        sync_warp();  // all have read the stage
        if (k + STAGES < end) {
            if (k + STAGES - known == 32) {
                known += 32, known_block = later_block;
                later_block = known + 32 < end ? look_up(known + 32) : 0;
            }
            if (lane == k + STAGES - known) fetch(stage);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }

    // what the warp has found: per head the highest score, sum of weights, sums of values
    float2* states = reinterpret_cast<float2*>(shared + STATES);
    float* found = reinterpret_cast<float*>(shared + RING + warp * WARP_BYTES);
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int head = n * 8 + 2 * t + i;
            const float all = over_tokens(total[n][i], true);
            if (g == 0) states[warp * HEADS + head] = make_float2(highest[n][i], all);
            if (begin < end && head < GROUP)
#pragma unroll
                for (int j = 0; j < STEPS; j++) {
                    float* of_step = found + head * SUM_NUMBERS + j * 16;
                    of_step[CODES ? 2 * g : g] = sum[n][j][i], of_step[CODES ? 2 * g + 1 : g + 8] = sum[n][j][i + 2];
                }
        }
    sync_block();

    auto write = [&](int item, float4 v, float weight) {
        const float by = weight > 0 ? 1 / weight : 1;  // a padded row without a token gets zeros
        char* to = y + (size_t(sequence) * kv_heads + kv_head) * (GROUP * DIM * 2) + item * 8;
        *reinterpret_cast<uint2*>(to) = {to_pair(v.x * by, v.y * by), to_pair(v.z * by, v.w * by)};
    };
    // Of the group's dimensions, four at a time, this block adds up those from `first_item` on. It expects them of all blocks,
    // and the states of the heads that they are of.
    constexpr int ITEMS = GROUP * DIM / 4;
    const int first_item = split * SHARE, rest = ITEMS - first_item, items = rest < 0 ? 0 : rest < SHARE ? rest : SHARE;
    if (SPLITS > 1) {
        const int heads = items ? (first_item + items - 1) / (DIM / 4) - first_item / (DIM / 4) + 1 : 0;
        if (thread == 0) barrier_expect(here + RECEIVED, SPLITS * 16 * (items + heads));
        cluster_wait();  // the others have begun: their memory may be written
    }
    for (int item = thread; item < ITEMS; item += THREADS) {
        const int head = item / (DIM / 4), column = item % (DIM / 4) * 4;
        float top, weight;
        const float4 v = add<WARPS>(
            [&](int i) { return states[i * HEADS + head]; },
            [&](int i) {
                return *reinterpret_cast<const float4*>(shared + RING + i * WARP_BYTES + (head * SUM_NUMBERS + column) * 4);
            },
            top, weight);
        if (SPLITS == 1) write(item, v, weight);
        else {
            const int to = item / SHARE;  // who adds it up
            send_remote(here + PARTS + (split * SHARE + item % SHARE) * 16, to, v, here + RECEIVED);
            if (item % SHARE == 0 || column == 0)
                send_remote(here + PART_STATES + (split * HEADS + head) * 16, to,
                            make_float4(weight == 0 ? nothing : top, weight, 0, 0), here + RECEIVED);
        }
    }
    if (SPLITS == 1) return;
    barrier_wait(here + RECEIVED, 0);  // also so that nobody is sent to who has left
    for (int i = thread; i < items; i += THREADS) {
        const int item = first_item + i, head = item / (DIM / 4);
        float top, weight;
        const float4 v = add<SPLITS>(
            [&](int j) { return *reinterpret_cast<const float2*>(shared + PART_STATES + (j * HEADS + head) * 16); },
            [&](int j) { return *reinterpret_cast<const float4*>(shared + PARTS + (j * SHARE + i) * 16); }, top, weight);
        write(item, v, weight);
    }
}
