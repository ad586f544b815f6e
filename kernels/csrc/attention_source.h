// The paged cache, chunk by chunk: in its own type where it lies where the tiles can read it, else converted into a
// thread's own scratch. The bits of the result are the same.
//
// B blocks of S positions; K KV heads of D elements, Dv of a value; R + P elements of a latent.
#pragma once

#include <type_traits>

#include "attention_rows.h"

// One row of `size` items, as floats.
template <class T>
inline void convert_row(const typename T::Item* row, int64_t size, float* out) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, T::load16(row + i));
    for (; i < size; ++i) out[i] = T::load1(row + i);
}

// What is converted keeps the scales of its type.
template <bool WITH_SCALES>
struct Converted : F32 {
    static constexpr bool SCALED = WITH_SCALES;
};

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
    float* key_scales(int b) { return key_scales_ + b * LANES; }
    float* value_scales(int b) { return value_scales_ + b * LANES; }

  private:
    int64_t key_floats_ = 0, value_floats_ = 0;
    std::vector<float> floats_;
    float key_scales_[CHUNK], value_scales_[CHUNK];
};

// K [B, K, D, S] and V [B, K, S, Dv]; the scales [B, K, S], or null.
template <class T>
struct HeadSource {
    using Item = typename T::Item;
    const Item *k, *v;
    const float *k_scale, *v_scale;
    int64_t num_kv_heads, block_size, key_size, value_size;

    // Shows to the rows positions [first, end), at most a chunk, of a KV head of the sequence whose block table is `table`.
    // Its context ends at `context_len`.
    void show(Rows& rows, const int32_t* table, int64_t head, int64_t first, int64_t end, int64_t context_len, Scratch& scratch) const {
        const bool readable = block_size % LANES == 0 && value_size % LANES == 0;  // sixteen positions lie in one block
        const bool once = rows.num_rows <= ROWS_AT_ONCE;  // what is read often is better converted before
        if (readable && (once || std::is_same_v<T, F32>)) rows.see(in_place(table, head, first, end, context_len));
        else rows.see(converted(table, head, first, end, scratch));
    }

  private:
    Chunk<T> in_place(const int32_t* table, int64_t head, int64_t first, int64_t end, int64_t context_len) const {
        Chunk<T> chunk(first, end, block_size, value_size);
        chunk.has_ahead = true;
        for (int b = 0; b < chunk.num_blocks; ++b) {
            const int64_t start = first + b * LANES, next = start + CHUNK < context_len ? start + CHUNK : start;
            chunk.keys[b] = key(table, head, start);
            chunk.values[b] = value(table, head, start);
            chunk.keys_ahead[b] = key(table, head, next);
            chunk.values_ahead[b] = value(table, head, next);
            if constexpr (T::SCALED) {
                chunk.key_scales[b] = k_scale + place(table, head, start);
                chunk.value_scales[b] = v_scale + place(table, head, start);
            }
        }
        return chunk;
    }

    Chunk<Converted<T::SCALED>> converted(const int32_t* table, int64_t head, int64_t first, int64_t end, Scratch& scratch) const {
        Chunk<Converted<T::SCALED>> chunk(first, end, LANES, padded(value_size));
        scratch.open(key_size, chunk.value_stride);
        for (int b = 0; b < chunk.num_blocks; ++b) {
            const int64_t start = first + b * LANES, last = std::min(start + LANES, end);
            if (block_size % LANES == 0) convert_columns(key(table, head, start), scratch.keys(b));
            for (int64_t p = start; p < last; ++p) {
                if (block_size % LANES != 0) convert_column(key(table, head, p), scratch.keys(b) + p - start);
                convert_row<T>(value(table, head, p), value_size, scratch.values(b) + (p - start) * chunk.value_stride);
                if constexpr (T::SCALED) {
                    scratch.key_scales(b)[p - start] = k_scale[place(table, head, p)];
                    scratch.value_scales(b)[p - start] = v_scale[place(table, head, p)];
                }
            }
            chunk.keys[b] = scratch.keys(b);
            chunk.values[b] = scratch.values(b);
            chunk.key_scales[b] = scratch.key_scales(b);
            chunk.value_scales[b] = scratch.value_scales(b);
        }
        return chunk;
    }

    void convert_columns(const Item* columns, float* out) const {
        for (int64_t d = 0; d < key_size; ++d) store(out + d * LANES, T::load16(columns + d * block_size));
    }
    void convert_column(const Item* column, float* out) const {
        for (int64_t d = 0; d < key_size; ++d) out[d * LANES] = T::load1(column + d * block_size);
    }

    int64_t place(const int32_t* table, int64_t head, int64_t position) const {
        return (table[position / block_size] * num_kv_heads + head) * block_size + position % block_size;
    }
    const Item* key(const int32_t* table, int64_t head, int64_t position) const {
        return k + (table[position / block_size] * num_kv_heads + head) * key_size * block_size + position % block_size;
    }
    const Item* value(const int32_t* table, int64_t head, int64_t position) const {
        return v + place(table, head, position) * value_size;
    }
};

// Latents [B, S, R + P], K as a whole and V in their first R elements.
template <class T>
struct LatentSource {
    const typename T::Item* latent;
    int64_t block_size, key_size, value_size;

    void show(Rows& rows, const int32_t* table, int64_t, int64_t first, int64_t end, int64_t, Scratch& scratch) const {
        Chunk<F32> chunk(first, end, LANES, padded(key_size));
        scratch.open(key_size, chunk.value_stride);
        for (int b = 0; b < chunk.num_blocks; ++b) {
            const int64_t start = first + b * LANES, count = std::min<int64_t>(LANES, end - start);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t place = table[(start + i) / block_size] * block_size + (start + i) % block_size;
                convert_row<T>(latent + place * key_size, key_size, scratch.values(b) + i * chunk.value_stride);
            }
            turn(scratch.values(b), chunk.value_stride, count, scratch.keys(b));
            chunk.keys[b] = scratch.keys(b);
            chunk.values[b] = scratch.values(b);
        }
        rows.see(chunk);
    }

  private:
    // Rows [count, D] to columns [D, 16], a few of them at a time: what is written stays in the nearest cache.
    void turn(const float* rows, int64_t stride, int64_t count, float* columns) const {
        constexpr int64_t COLUMNS_AT_ONCE = 64;
        for (int64_t start = 0; start < key_size; start += COLUMNS_AT_ONCE)
            for (int64_t i = 0; i < count; ++i)
                for (int64_t d = start; d < std::min(start + COLUMNS_AT_ONCE, key_size); ++d)
                    columns[d * LANES + i] = rows[i * stride + d];
    }
};
