// Which units of which tiles a block of w4_tile.cu works on, and whose sums it adds. Needs STRETCHED, MOST_SHARES, R, T and
// UNIT, which the kernel defines.
#pragma once
// A stretch of one tile: `units` of 128 K from unit `first`.
struct Stretch {
    int tile, first, units;
};
// What a block does, in order: whole tiles first; then its share of a tile, or its stretch of tiles laid end to end.
struct Work {
    int tile_units, tiles, blocks, whole, whole_end, total, at, end, shares, stretches;
    DEVICE Work(int tiles, int tile_units, int block, int blocks) : tile_units(tile_units), tiles(tiles), blocks(blocks) {
        at = end = 0, whole = block, shares = 1;
        if (STRETCHED) {
            const int rest = tiles % blocks;
            // the last stretch is longer than a tile where there are as many, so that few blocks share one
            const int cut = rest == 0 ? 0 : tiles < blocks ? tiles : rest + blocks;
            whole_end = tiles - cut, total = cut * tile_units, stretches = total < blocks ? total : blocks;
            at = start(block), end = start(block + 1);
        } else {
            const int most = blocks / tiles < MOST_SHARES ? blocks / tiles : MOST_SHARES;
            shares = most < 1 ? 1 : most < tile_units ? most : tile_units;
            whole_end = shares == 1 ? tiles : 0, total = shares == 1 ? 0 : tiles * tile_units;
            if (shares > 1 && block < tiles * shares) {
                const int rank = block % shares, tile = block / shares;
                at = tile * tile_units + tile_units * rank / shares, end = tile * tile_units + tile_units * (rank + 1) / shares;
            }
        }
    }
    DEVICE int start(int block) const { return block < stretches ? int(int64_t(total) * block / stretches) : total; }
    DEVICE int block_of(int unit) const { return int((int64_t(unit + 1) * stretches - 1) / total); }
    DEVICE bool next(Stretch& s) {
        if (whole < whole_end) {
            s = {whole, 0, tile_units};
            whole += blocks;
            return true;
        }
        if (at >= end) return false;
        const int tile = at / tile_units, first = at - tile * tile_units, left = tile_units - first, mine = end - at;
        s = {whole_end + tile, first, left < mine ? left : mine};
        at += s.units;
        return true;
    }
    // Whom this block hears of: STRETCHED, the blocks that have the rest of its last tile (none: 0); else its tile's others.
    DEVICE int num_heard(int block) const {
        if (!STRETCHED) return at < end && shares > 1 ? shares : 0;
        const int tile = (end - 1) / tile_units;
        if (at >= end || end == (tile + 1) * tile_units || at > tile * tile_units) return 0;
        return block_of((tile + 1) * tile_units - 1) - block;
    }
    DEVICE bool is_heard() const { return STRETCHED ? at < end && at % tile_units != 0 : at < end && shares > 1; }
};
// Step by step through a block's work, for the producer.
struct Cursor {
    Work work;
    int row_tiles, n, m, step, left;
    DEVICE Cursor(const Work& work, int row_tiles) : work(work), row_tiles(row_tiles), n(0), m(0), step(0), left(0) {}
    DEVICE bool next() {
        if (left == 0) {
            Stretch s;
            if (!work.next(s)) return false;
            n = s.tile / row_tiles * R, m = s.tile % row_tiles * T;
            step = s.first * UNIT - 1, left = s.units * UNIT;
        }
        step++, left--;
        return true;
    }
};
