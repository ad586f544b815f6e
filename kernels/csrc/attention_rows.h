// The running softmax of the rows that one thread works on (Milakov & Gimelshein, 2018; Dao et al., 2022).
//
// Positions come in chunks that begin at multiples of CHUNK. A chunk in which a row sees nothing leaves the row as it
// is, and position p always adds to lane p % 16 of the row's sum: so a row's bits depend on what it sees, and not on
// the rows beside it nor on where its prompt was cut.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "attention_arguments.h"
#include "attention_tile.h"

constexpr int CHUNK = 64, BLOCKS = CHUNK / LANES;  // positions of a chunk, and its blocks of 16
constexpr int MAX_ROWS = 64;                       // of a tile: its query heads times its tokens
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Positions [first, end) of one KV head, in items of T.
template <class T>
struct Chunk {
    using Item = typename T::Item;
    Chunk(int64_t start, int64_t end, int64_t key_rows, int64_t value_rows)
        : first(start), num_blocks(static_cast<int>((end - start + LANES - 1) / LANES)), key_stride(key_rows), value_stride(value_rows) {}

    int64_t first;
    int num_blocks;
    int64_t key_stride, value_stride;
    const Item* keys[BLOCKS];    // [D, 16] each, `key_stride` between rows
    const Item* values[BLOCKS];  // [16, Dv] each, `value_stride` between rows
    bool has_ahead = false;
    const Item *keys_ahead[BLOCKS], *values_ahead[BLOCKS];  // of the next chunk, or the same again
    const float *key_scales[BLOCKS], *value_scales[BLOCKS];  // [16] each; of int8 only
};

inline int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

class Rows {
  public:
    int num_rows = 0;
    int64_t at[MAX_ROWS];  // position of each row, ascending
    int64_t places[MAX_ROWS];  // index of each row in the step's [T, H]

    // Room for other rows; nothing is allocated where there were as many before.
    void open(int count, int64_t size, int64_t value_size, const Options& options) {
        num_rows = count;
        size_ = size;
        width_ = padded(value_size);
        options_ = options;
        q_.resize(index(count, size_));
        sums_.resize(index(count, LANES));
        out_.resize(index(count, width_));
    }

    // Row r is query `q` [D] of `head`, at `position`; its result goes to `place`.
    void set(int r, int64_t place, const float* q, int head, int64_t position) {
        const float scale = options_.scale;
        float* scaled = &q_[index(r, size_)];
        for (int64_t d = 0; d < size_; ++d) scaled[d] = q[d] * scale;
        heads_[r] = head;
        places[r] = place;
        at[r] = position;
    }

    int64_t first_seen(int r) const { return options_.window > 0 ? std::max<int64_t>(0, at[r] - options_.window + 1) : 0; }

    void clear() {
        std::fill_n(most_, num_rows, NOTHING);
        std::fill_n(sums_.begin(), num_rows * LANES, 0.0f);
        std::fill_n(out_.begin(), num_rows * width_, 0.0f);
    }

    // Adds what the rows see of a chunk.
    template <class T>
    void see(const Chunk<T>& chunk) {
        for (int r = 0; r < num_rows; r += ROWS_AT_ONCE) {
            const int count = std::min(ROWS_AT_ONCE, num_rows - r);
            const int64_t last = at[r + count - 1] - chunk.first;  // what lies beyond may be anything
            if (last < 0 || first_seen(r) >= chunk.first + LANES * chunk.num_blocks) continue;
            const int64_t num_seen = std::min<int64_t>(last + 1, LANES * chunk.num_blocks);
            if (chunk.has_ahead && r == 0)
                with_rows(count, [&]<int ROWS>() { see_rows<T, ROWS, true>(r, chunk, num_seen); });
            else
                with_rows(count, [&]<int ROWS>() { see_rows<T, ROWS, false>(r, chunk, num_seen); });
        }
    }

    // Adds what `part`, the same rows over later positions, has seen.
    void merge(const Rows& part) {
        for (int r = 0; r < num_rows; ++r) {
            if (part.most_[r] == NOTHING) continue;
            const float most = std::max(most_[r], part.most_[r]);
            const vf ours = exp(set1(most_[r] - most)), theirs = exp(set1(part.most_[r] - most));
            most_[r] = most;
            combine(&sums_[index(r, LANES)], &part.sums_[index(r, LANES)], LANES, ours, theirs);
            combine(&out_[index(r, width_)], &part.out_[index(r, width_)], width_, ours, theirs);
        }
    }

    // The attention of row r, [Dv].
    void finish(int r, float* out, int64_t value_size) const {
        float sum = sum_lanes(load(&sums_[index(r, LANES)])), most = most_[r], factor = 1;
        if (options_.sinks != nullptr) {
            const float sink = options_.sinks[heads_[r]];
            most = std::max(most, sink);
            factor = exp1(most_[r] - most);
            sum = sum * factor + exp1(sink - most);
        }
        const vf share = set1(factor / sum);
        const float* row = &out_[index(r, width_)];
        for (int64_t d = 0; d < value_size; d += LANES) {
            const vf x = fma(load(row + d), share, zero());  // + 0: no row ends with a zero of the other sign
            if (d + LANES <= value_size) store(out + d, x);
            else store_first(out + d, x, static_cast<int>(value_size - d));
        }
    }

  private:
    static size_t index(int r, int64_t width) { return static_cast<size_t>(r * width); }
    static float exp1(float x) {
        alignas(64) float lanes[LANES];
        store(lanes, exp(set1(x)));
        return lanes[0];
    }
    static void combine(float* ours, const float* theirs, int64_t count, vf our_factor, vf their_factor) {
        for (int64_t i = 0; i < count; i += LANES)
            store(ours + i, fma(load(theirs + i), their_factor, mul(load(ours + i), our_factor)));
    }

    // `count` positions of the chunk are written, as far as the last of the rows sees. AHEAD: fetches the next chunk.
    template <class T, int ROWS, bool AHEAD>
    void see_rows(int r, const Chunk<T>& chunk, int64_t count) {
        alignas(64) float logits[ROWS * CHUNK];
        float factors[ROWS];
        const int num_blocks = static_cast<int>((count + LANES - 1) / LANES);
        constexpr int N = ACCUMULATORS / ROWS >= 4 ? 4 : ACCUMULATORS / ROWS;
        const float* q = &q_[index(r, size_)];
        int b = 0;
        for (; b + N <= num_blocks; b += N)
            multiply_keys<T, ROWS, N, AHEAD>(q, size_, chunk.keys + b, chunk.keys_ahead + b, chunk.key_stride, logits + b * LANES, CHUNK);
        for (; b < num_blocks; ++b)
            multiply_keys<T, ROWS, 1, AHEAD>(q, size_, chunk.keys + b, chunk.keys_ahead + b, chunk.key_stride, logits + b * LANES, CHUNK);
        if constexpr (T::SCALED) scale<ROWS>(logits, chunk.key_scales, num_blocks);
        weigh<ROWS>(r, chunk.first, num_blocks, logits, factors);
        if constexpr (T::SCALED) scale<ROWS>(logits, chunk.value_scales, num_blocks);
        int64_t d = 0;
        float* out = &out_[index(r, width_)];
        for (; d + N * LANES <= width_; d += N * LANES)
            multiply_values<T, ROWS, N, AHEAD>(logits, CHUNK, chunk.values, chunk.values_ahead, chunk.value_stride, count, factors, d, out, width_);
        for (; d < width_; d += LANES)
            multiply_values<T, ROWS, 1, AHEAD>(logits, CHUNK, chunk.values, chunk.values_ahead, chunk.value_stride, count, factors, d, out, width_);
    }

    template <int ROWS>
    static void scale(float* logits, const float* const* scales, int num_blocks) {
        for (float* row = logits; row < logits + ROWS * CHUNK; row += CHUNK)
            for (int b = 0; b < num_blocks; ++b) store(row + b * LANES, mul(load(row + b * LANES), load(scales[b])));
    }

    // Turns the logits of rows into weights, 0 where one sees nothing; factors: for what each saw before.
    template <int ROWS>
    void weigh(int r, int64_t first, int num_blocks, float* logits, float* factors) {
        const bool all_seen = first_seen(r + ROWS - 1) <= first && at[r] >= first + num_blocks * LANES - 1;
        const bool as_they_are = all_seen && options_.softcap == 0;
        alignas(64) float now[LANES], changes[LANES] = {};
        for (int i = 0; i < ROWS; ++i) {
            float* row = logits + i * CHUNK;
            vf most = set1(NOTHING);
            for (int b = 0; b < num_blocks; ++b) {
                vf x = load(row + b * LANES);
                if (!as_they_are) {
                    x = capped(x);
                    if (!all_seen) x = masked(x, first + b * LANES, r + i);
                    store(row + b * LANES, x);
                }
                most = max(x, most);
            }
            now[i] = std::max(max_lanes(most), most_[r + i]);
            changes[i] = now[i] == most_[r + i] ? 0.0f : most_[r + i] - now[i];
        }
        store(changes, exp(load(changes)));
        for (int i = 0; i < ROWS; ++i) {
            float* row = logits + i * CHUNK;
            const vf shift = set1(now[i] == NOTHING ? 0.0f : now[i]);
            vf sum = zero();
            for (int b = 0; b < num_blocks; ++b) {
                const vf weight = exp(sub(load(row + b * LANES), shift));
                store(row + b * LANES, weight);
                sum = add(sum, weight);
            }
            float* sums = &sums_[index(r + i, LANES)];
            store(sums, fma(load(sums), set1(changes[i]), sum));
            most_[r + i] = now[i];
            factors[i] = changes[i];
        }
    }

    vf capped(vf x) const {
        if (options_.softcap == 0) return x;
        const vf cap = set1(options_.softcap), one = set1(1.0f), two = set1(2.0f);
        const vf e = exp(mul(two, div(x, cap)));  // tanh y = 1 - 2 / (e^2y + 1)
        return mul(cap, sub(one, div(two, add(e, one))));
    }

    vf masked(vf x, int64_t position, int r) const {
        static const int32_t steps[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        const vf positions = to_float(add(load(steps), set1(static_cast<int32_t>(position))));
        x = select_greater(positions, set1(static_cast<float>(at[r])), set1(NOTHING), x);
        return select_greater(set1(static_cast<float>(first_seen(r))), positions, set1(NOTHING), x);
    }

    int64_t size_ = 0, width_ = 0;
    Options options_;
    std::vector<float> q_;     // [R, D], times the scale
    int heads_[MAX_ROWS];
    float most_[MAX_ROWS];     // the largest logit so far
    std::vector<float> sums_;  // [R, 16] of e^(logit - most)
    std::vector<float> out_;   // [R, width] of e^(logit - most) V
};
