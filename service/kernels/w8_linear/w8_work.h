// Which parts of which tiles a block of w8_tile.cu computes, and which blocks share a tile.
#pragma once
#include "w8_layout.h"

// y [rows][N] from x [rows][K] and w [N][K].
struct Linear {
    int rows, N, K;
    int steps, row_tiles, tiles;  // steps: of 128 K
    DEVICE Linear(int rows, int N, int K) : rows(rows), N(N), K(K) {
        steps = (K + 127) / 128, row_tiles = (rows + T - 1) / T, tiles = (N + R - 1) / R * row_tiles;
    }
    DEVICE int first_row(int tile) const { return tile % row_tiles * T; }
    DEVICE int first_output(int tile) const { return tile / row_tiles * R; }
};
// A block among others, and what they share: the first `stream_tiles`, which come to `stream` steps.
struct Grid {
    int block, blocks, stream_tiles, stream;
};
// Steps [begin, end) of a tile.
struct Part {
    int tile, begin, end;
};
// A block's parts, in order: its run of steps of the shared tiles, wherever one ends, then its turns of the others, whole.
// Every role walks over them by itself.
struct Work {
    int steps, tiles;
    Grid grid;
    int at, stop_at, whole;
    DEVICE Work(const Linear& linear, const Grid& grid) : steps(linear.steps), tiles(linear.tiles), grid(grid) {
        at = grid.block * grid.stream / grid.blocks, whole = grid.stream_tiles + grid.block;
        stop_at = (grid.block + 1) * grid.stream / grid.blocks;
    }
    DEVICE bool next(Part& part) {
        if (at < stop_at) {
            part.tile = at / steps, part.begin = at - part.tile * steps;
            part.end = part.begin + stop_at - at < steps ? part.begin + stop_at - at : steps;
            at += part.end - part.begin;
        } else if (whole < tiles) {
            part.tile = whole, part.begin = 0, part.end = steps, whole += grid.blocks;
        } else
            return false;
        return true;
    }
    DEVICE bool is_whole(const Part& part) const { return part.begin == 0 && part.end == steps; }
    // The blocks that have a tile's first step and its last one; those between have the rest.
    DEVICE int first_block(int tile) const { return ((tile * steps + 1) * grid.blocks - 1) / grid.stream; }
    DEVICE int last_block(int tile) const { return ((tile * steps + steps) * grid.blocks - 1) / grid.stream; }
};
