// The paged cache as chunks of floats: in place where it holds floats in blocks of a multiple of 16, else converted into
// a thread's own scratch.
//
// B blocks of S positions; K KV heads of D elements, Dv of a value; R + P elements of a latent.
#pragma once

#include <type_traits>

#include "attention_rows.h"
#include "kv_types.h"

// One row of `size` elements, as floats and times `scale`.
template <class T>
inline void convert_row(const typename T::Item* row, int64_t size, float scale, float* out) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, mul(T::load16(row + i), set1(scale)));
    for (; i < size; ++i) out[i] = T::load1(row + i) * scale;
}

// Where a chunk is converted to.
class Scratch {
  public:
    void open(int64_t key_size, int64_t value_width) {
        key_floats_ = key_size * LANES;
        value_floats_ = value_width * LANES;
        floats_.resize(static_cast<size_t>((key_floats_ + value_floats_) * BLOCKS));
    }
    float* keys(int b) { return floats_.data() + b * key_floats_; }
    float* values(int b) { return floats_.data() + BLOCKS * key_floats_ + b * value_floats_; }

  private:
    int64_t key_floats_ = 0, value_floats_ = 0;
    std::vector<float> floats_;
};

// K [B, K, D, S] and V [B, K, S, Dv]; the scales [B, K, S], or null.
template <class T>
struct HeadSource {
    using Item = typename T::Item;
    const Item *k, *v;
    const float *k_scale, *v_scale;
    int64_t num_kv_heads, block_size, key_size, value_size;

    // Positions [first, end) of a KV head of the sequence whose block table is `table`, at most a chunk; the context ends
    // at `context_len`.
    Chunk read(const int32_t* table, int64_t head, int64_t first, int64_t end, int64_t context_len, Scratch& scratch) const {
        const bool whole = block_size % LANES == 0;  // sixteen positions lie in one block
        const bool keys_in_place = std::is_same_v<T, F32> && whole;
        const bool values_in_place = keys_in_place && value_size % LANES == 0;
        Chunk chunk(first, end, keys_in_place ? block_size : LANES, padded(value_size));
        scratch.open(key_size, chunk.value_stride);
        for (int b = 0; b < chunk.num_blocks; ++b) {
            const int64_t start = first + b * LANES, last = std::min(start + LANES, end);
            const int64_t next = start + CHUNK < context_len ? start + CHUNK : start;
            const Item *columns = key(table, head, start), *columns_ahead = key(table, head, next);
            const Item *rows = value(table, head, start), *rows_ahead = value(table, head, next);
            chunk.keys[b] = chunk.keys_ahead[b] = scratch.keys(b);
            chunk.values[b] = chunk.values_ahead[b] = scratch.values(b);
            if constexpr (std::is_same_v<T, F32>) {
                if (keys_in_place) chunk.keys[b] = columns, chunk.keys_ahead[b] = columns_ahead;
                if (values_in_place) chunk.values[b] = rows, chunk.values_ahead[b] = rows_ahead;
            }
            if (!keys_in_place && whole) convert_columns(columns, columns_ahead, scale_of(k_scale, table, head, start), scratch.keys(b));
            if (!whole) gather_columns(table, head, start, last, scratch.keys(b));
            if (!values_in_place && whole)
                convert_rows(rows, rows_ahead, scale_of(v_scale, table, head, start), last - start, scratch.values(b));
            if (!whole) gather_rows(table, head, start, last, scratch.values(b));
        }
        return chunk;
    }

  private:
    int64_t place(const int32_t* table, int64_t head, int64_t position) const {
        return (table[position / block_size] * num_kv_heads + head) * block_size + position % block_size;
    }
    const Item* key(const int32_t* table, int64_t head, int64_t position) const {
        return k + (table[position / block_size] * num_kv_heads + head) * key_size * block_size + position % block_size;
    }
    const Item* value(const int32_t* table, int64_t head, int64_t position) const {
        return v + place(table, head, position) * value_size;
    }
    const float* scale_of(const float* scales, const int32_t* table, int64_t head, int64_t position) const {
        return scales == nullptr ? nullptr : scales + place(table, head, position);
    }

    void convert_columns(const Item* columns, const Item* ahead, const float* scales, float* out) const {
        const vf scale = scales == nullptr ? set1(1.0f) : load(scales);
        for (int64_t d = 0; d < key_size; ++d) {
            store(out + d * LANES, mul(T::load16(columns + d * block_size), scale));
            _mm_prefetch(ahead + d * block_size, _MM_HINT_T1);
        }
    }

    void convert_rows(const Item* rows, const Item* ahead, const float* scales, int64_t count, float* out) const {
        for (int64_t i = 0; i < count; ++i, out += padded(value_size)) {
            convert_row<T>(rows + i * value_size, value_size, scales == nullptr ? 1.0f : scales[i], out);
            for (int64_t d = 0; d < value_size; d += 64 / static_cast<int64_t>(sizeof(Item)))
                _mm_prefetch(ahead + i * value_size + d, _MM_HINT_T1);
        }
    }

    void gather_columns(const int32_t* table, int64_t head, int64_t start, int64_t end, float* out) const {
        for (int64_t p = start; p < end; ++p) {
            const float* scale = scale_of(k_scale, table, head, p);
            const Item* column = key(table, head, p);
            for (int64_t d = 0; d < key_size; ++d)
                out[d * LANES + p - start] = T::load1(column + d * block_size) * (scale == nullptr ? 1.0f : *scale);
        }
    }

    void gather_rows(const int32_t* table, int64_t head, int64_t start, int64_t end, float* out) const {
        for (int64_t p = start; p < end; ++p, out += padded(value_size)) {
            const float* scale = scale_of(v_scale, table, head, p);
            convert_row<T>(value(table, head, p), value_size, scale == nullptr ? 1.0f : *scale, out);
        }
    }
};

// Latents [B, S, R + P], K as a whole and V in their first R elements.
template <class T>
struct LatentSource {
    const typename T::Item* latent;
    int64_t block_size, key_size, value_size;

    Chunk read(const int32_t* table, int64_t, int64_t first, int64_t end, int64_t, Scratch& scratch) const {
        Chunk chunk(first, end, LANES, padded(key_size));
        scratch.open(key_size, chunk.value_stride);
        for (int b = 0; b < chunk.num_blocks; ++b) {
            const int64_t start = first + b * LANES;
            chunk.keys[b] = chunk.keys_ahead[b] = scratch.keys(b);
            chunk.values[b] = chunk.values_ahead[b] = scratch.values(b);
            for (int64_t p = start; p < std::min(start + LANES, end); ++p) {
                float* row = scratch.values(b) + (p - start) * chunk.value_stride;
                convert_row<T>(latent + (table[p / block_size] * block_size + p % block_size) * key_size, key_size, 1.0f, row);
                for (int64_t d = 0; d < key_size; ++d) scratch.keys(b)[d * LANES + p - start] = row[d];
            }
        }
        return chunk;
    }
};
