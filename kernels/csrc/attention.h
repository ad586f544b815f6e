// Causal attention of all rows of a step over a paged cache: decode and prefill are one loop.
//
// Work is cut into tiles of rows that share a KV head: some tokens of a span, with all query heads of the group. Where
// there are too few tiles for the threads, their contexts are cut as well. Contexts are always computed in segments
// that are merged in order, so the cut changes no bit.
//
// T rows of the step; H query heads, K KV heads; D elements of a query, Dv of a value.
#pragma once

#include "attention_source.h"
#include "pool.h"

constexpr int64_t SEGMENT = 16 * CHUNK;

namespace attention {

struct Tile {
    const Span* span;
    int64_t head, first_row;  // of the rows (token, query head of the group)
};

inline std::vector<Tile> tiles_of(const Step& step) {
    std::vector<Tile> tiles;
    const int64_t group = step.num_heads / step.num_kv_heads;
    for (const Span* span = step.spans; span != step.spans + step.num_spans; ++span)
        for (int64_t row = 0; row < span->num_rows * group; row += MAX_ROWS)
            for (int64_t head = 0; head < step.num_kv_heads; ++head) tiles.push_back({span, head, row});
    return tiles;
}

inline void open(Rows& rows, const Step& step, const Tile& tile, const Options& options) {
    const int64_t group = step.num_heads / step.num_kv_heads;
    const int64_t count = std::min<int64_t>(MAX_ROWS, tile.span->num_rows * group - tile.first_row);
    rows.open(static_cast<int>(count), step.key_size, step.value_size, options);
    for (int r = 0; r < count; ++r) {
        const int64_t token = (tile.first_row + r) / group, head = tile.head * group + (tile.first_row + r) % group;
        const int64_t row = (tile.span->row_start + token) * step.num_heads + head;
        rows.set(r, row, step.q + row * step.key_size, static_cast<int>(head), tile.span->start + token);
    }
}

// What the rows see of one segment.
template <class Source>
void see_segment(Rows& rows, const Source& source, const Step& step, const Tile& tile, int64_t segment, Scratch& scratch) {
    const int64_t seen = rows.first_seen(0) / CHUNK * CHUNK, end = rows.at[rows.num_rows - 1] + 1;
    const int32_t* table = step.blocks + tile.span->table_offset;
    rows.clear();
    for (int64_t first = std::max(seen, segment * SEGMENT); first < end && first < (segment + 1) * SEGMENT; first += CHUNK)
        source.show(rows, table, tile.head, first, std::min<int64_t>(first + CHUNK, end), end, scratch);
}

inline void finish(const Rows& rows, const Step& step) {
    for (int r = 0; r < rows.num_rows; ++r) rows.finish(r, step.out + rows.places[r] * step.value_size, step.value_size);
}

// Each tile on one thread.
template <class Source>
void run_whole(const Source& source, const Step& step, const Options& options, const std::vector<Tile>& tiles) {
    const int64_t num_tiles = static_cast<int64_t>(tiles.size());
    pool::parallel_for(num_tiles, [&](int64_t item) {
        static thread_local Rows rows, part;
        static thread_local Scratch scratch;
        const Tile& tile = tiles[static_cast<size_t>(num_tiles - 1 - item)];  // long ones first
        open(rows, step, tile, options);
        int64_t segment = rows.first_seen(0) / SEGMENT;
        const int64_t last = rows.at[rows.num_rows - 1] / SEGMENT;
        see_segment(rows, source, step, tile, segment, scratch);
        if (segment < last) open(part, step, tile, options);
        while (++segment <= last) {
            see_segment(part, source, step, tile, segment, scratch);
            rows.merge(part);
        }
        finish(rows, step);
    });
}

// Each segment of each tile on one thread, then the merges.
template <class Source>
void run_segments(const Source& source, const Step& step, const Options& options, const std::vector<Tile>& tiles) {
    struct Part {
        const Tile* tile;
        int64_t segment;
        bool first;
        Rows rows;
    };
    std::vector<Part> parts;
    for (const Tile& tile : tiles) {
        Rows rows;
        open(rows, step, tile, options);
        const int64_t first = rows.first_seen(0) / SEGMENT, last = rows.at[rows.num_rows - 1] / SEGMENT;
        for (int64_t segment = first; segment <= last; ++segment) parts.push_back({&tile, segment, segment == first, rows});
    }
    pool::parallel_for(static_cast<int64_t>(parts.size()), [&](int64_t item) {
        static thread_local Scratch scratch;
        Part& part = parts[static_cast<size_t>(item)];
        see_segment(part.rows, source, step, *part.tile, part.segment, scratch);
    });
    Rows* total = nullptr;
    for (Part& part : parts) {
        if (part.first && total != nullptr) finish(*total, step);
        if (part.first) total = &part.rows;
        else total->merge(part.rows);
    }
    if (total != nullptr) finish(*total, step);
}

template <class Source>
void run(const Source& source, const Step& step, const Options& options) {
    const std::vector<Tile> tiles = tiles_of(step);
    const bool few = pool::num_threads() > 1 && static_cast<int64_t>(tiles.size()) < 2 * pool::num_threads();
    if (few) run_segments(source, step, options, tiles);
    else run_whole(source, step, options, tiles);
}

}  // namespace attention
