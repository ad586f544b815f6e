#include "matmul.h"

#include <cstdlib>
#include <new>

#include "activation.h"
#include "tiles.h"

namespace {

constexpr int64_t ALIGNMENT = 64;
constexpr int PANEL_SLOT = 7, NUM_SLOTS = 17;  // of `scratch`: a panel as floats; all there are
// From so many tiles on, a panel is turned into floats once and not by every tile.
constexpr int64_t MIN_TILES_TO_EXPAND = 3;

// Calls tile.template run<ROWS>() for the number of rows at hand.
template <int ROWS = MAX_ROWS, class Tile>
inline void with_rows(int num_rows, const Tile& tile) {
    if (num_rows == ROWS) return tile.template run<ROWS>();
    if constexpr (ROWS > 1) with_rows<ROWS - 1>(num_rows, tile);
}

template <class Panel>
struct FloatTile {
    const float* a;
    const Panel& panel;
    float* out;
    template <int ROWS>
    void run() const {
        float_tile<ROWS>(a, panel, out);
    }
};

template <class Meanwhile>
struct IntTile {
    const Int8Row* a;
    const int8_t* w;
    int64_t num_steps;
    int32_t* out;
    const Meanwhile& meanwhile;
    template <int ROWS>
    void run() const {
        int_tile<ROWS>(a, w, num_steps, out, meanwhile);
    }
};

// The product of one tile, before bias, becomes rows of y. value(r, h): one half of a row of it.
struct Finish {
    const Weights& w;
    int64_t panel, num_features;
    float* out;
    int64_t out_stride;
    const float* residual;

    template <class Value>
    void operator()(int64_t first_row, int num_rows, const Value& value) const {
        vf bias[2] = {zero(), zero()};
        if (w.bias)
            for (int h = 0; h < 2; ++h) bias[h] = load(w.bias + panel * PANEL + h * LANES);
        int64_t at = first_row * out_stride + panel * w.features_per_panel();
        for (int r = 0; r < num_rows; ++r, at += out_stride) {
            const vf low = add(value(r, 0), bias[0]), high = add(value(r, 1), bias[1]);
            if (w.gated()) {
                put(at, gate(w.activation, low, high), num_features);
            } else {
                put(at, low, num_features);
                put(at + LANES, high, num_features - LANES);
            }
        }
    }

    // Brings what rows [first_row, first_row + num_rows) of the panel are written to, and what is added, near.
    void fetch(int64_t first_row, int num_rows) const {
        int64_t at = first_row * out_stride + panel * w.features_per_panel();
        for (int r = 0; r < num_rows; ++r, at += out_stride)
            for (int64_t i = 0; i < num_features; i += LANES) {
                __builtin_prefetch(out + at + i, 1);
                if (residual) __builtin_prefetch(residual + at + i);
            }
    }

    void put(int64_t at, vf y, int64_t num_left) const {
        if (num_left >= LANES) {
            store(out + at, residual ? add(y, load(residual + at)) : y);
        } else if (num_left > 0) {
            const int n = static_cast<int>(num_left);
            store_first(out + at, residual ? add(y, load_first(residual + at, n)) : y, n);
        }
    }
};

template <class Panel>
void multiply_floats(const Panel& panel, const PackedRows& rows, int64_t k, int64_t first, int64_t last, const Finish& finish) {
    alignas(64) float product[MAX_ROWS * PANEL];
    for (int64_t tile = first; tile < last; ++tile) {
        const int num_rows = rows.rows_in(tile);
        with_rows(num_rows, FloatTile<Panel>{rows.floats + tile * MAX_ROWS * k, panel, product});
        finish(tile * MAX_ROWS, num_rows, [&](int r, int h) { return load(product + r * PANEL + h * LANES); });
    }
}

template <class Panel>
F32Panel expand(Panel panel) {
    float* out = static_cast<float*>(scratch(PANEL_SLOT, panel.k * PANEL * static_cast<int64_t>(sizeof(float))));
    for (int64_t start = 0, group = 0; start < panel.k; start += panel.group_size, ++group) {
        panel.start_group(group);
        for (int64_t row = start; row < start + panel.group_size; row += Panel::STEP) {
            vf b[Panel::STEP][2];
            panel.template load<2>(row, 0, b);
            for (int64_t s = 0; s < Panel::STEP; ++s)
                for (int h = 0; h < 2; ++h) store(out + (row + s) * PANEL + h * LANES, b[s][h]);
        }
    }
    return F32Panel(out, panel.k);
}

template <class Panel>
void multiply_stored(const Weights& w, const PackedRows& rows, int64_t p, int64_t first, int64_t last, const Finish& finish) {
    const Panel panel(w, p);
    if (last - first >= MIN_TILES_TO_EXPAND)
        multiply_floats(expand(panel), rows, w.k, first, last, finish);
    else
        multiply_floats(panel, rows, w.k, first, last, finish);
}

void multiply_int8(const Weights& w, const PackedRows& rows, int64_t panel, int64_t first, int64_t last, const Finish& finish) {
    const int64_t row_len = int8_row_len(w.k), num_steps = row_len / INT8_STEP;
    const int8_t* data = static_cast<const int8_t*>(w.data) + panel * row_len * PANEL;
    alignas(64) int32_t sums[2][MAX_ROWS * PANEL];
    const vf scales[2] = {load(w.scales + panel * PANEL), load(w.scales + panel * PANEL + LANES)};
    const vi shifts[2] = {load(w.sums + panel * PANEL), load(w.sums + panel * PANEL + LANES)};
    // A tile's rows are finished one by one while the next tile is computed.
    int num_ready = 0;
    for (int64_t tile = first; tile <= last; ++tile) {
        const int64_t ready_row = (tile - 1) * MAX_ROWS;
        const int32_t* ready = sums[(tile - 1) & 1];
        const auto finish_row = [&](int r) {
            if (r >= num_ready) return;
            const float row_scale = rows.scales[ready_row + r];
            finish(ready_row + r, 1, [&](int, int h) {
                const vi sum = load(ready + r * PANEL + h * LANES);
                return mul(to_float(INT8_STEP == 4 ? subtract(sum, shifts[h]) : sum), mul(set1(row_scale), scales[h]));
            });
        };
        if (tile == last) {
            for (int r = 0; r < num_ready; ++r) finish_row(r);
            break;
        }
        const int num_rows = rows.rows_in(tile);
        finish.fetch(tile * MAX_ROWS, num_rows);
        with_rows(num_rows, IntTile<decltype(finish_row)>{rows.codes + tile * MAX_ROWS * row_len, data, num_steps, sums[tile & 1], finish_row});
        num_ready = num_rows;
    }
}

// The largest magnitude of a row [K].
float largest(const float* x, int64_t k) {
    vf most = zero();
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) most = max(most, abs(load(x + i)));
    if (i < k) most = max(most, abs(load_first(x + i, static_cast<int>(k - i))));
    return max_lanes(most);
}

// Sixteen codes as INT8 rows want them, in groups of INT8_STEP that stand `num_rows` groups apart; the first `end` of them.
inline void put_codes(vi codes, Int8Row* out, int num_rows, int64_t end) {
    alignas(16) Int8Row shifted[LANES];
#if defined(__AVX512VNNI__)
    const __m128i bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(codes), _mm_set1_epi8(-128));  // + 128
    _mm_store_si128(reinterpret_cast<__m128i*>(shifted), bytes);
#else
    alignas(64) int32_t wide[LANES];
    store(wide, codes);
    for (int j = 0; j < LANES; ++j) shifted[j] = static_cast<Int8Row>(wide[j]);
#endif
    if (end == LANES)
        for (int64_t j = 0; j < LANES; j += INT8_STEP) std::memcpy(out + j * num_rows, shifted + j, INT8_STEP * sizeof(Int8Row));
    else
        for (int64_t j = 0; j < end; j += INT8_STEP) std::memcpy(out + j * num_rows, shifted + j, INT8_STEP * sizeof(Int8Row));
}

// Columns [start, K) of a row as codes into its place of a tile, [K / step][rows][step].
void quantize_row(const float* x, float factor, int64_t start, int64_t k, Int8Row* out, int num_rows) {
    int64_t i = start;
    for (; i + LANES <= k; i += LANES) put_codes(to_int(mul(load(x + i), set1(factor))), out + i * num_rows, num_rows, LANES);
    if (i < k) {
        const vf rest = load_first(x + i, static_cast<int>(k - i));
        put_codes(to_int(mul(rest, set1(factor))), out + i * num_rows, num_rows, int8_row_len(k) - i);
    }
}

// The same for the first columns of four neighbouring rows, whose groups are written together; returns how many columns.
inline int64_t quantize_four([[maybe_unused]] const float* const* x, [[maybe_unused]] const float* factors,
                             [[maybe_unused]] int64_t k, [[maybe_unused]] Int8Row* out, [[maybe_unused]] int num_rows) {
    int64_t i = 0;
#if defined(__AVX512VNNI__)
    for (; i + LANES <= k; i += LANES) {
        __m128i rows[4];
        for (int r = 0; r < 4; ++r) {
            const __m128i codes = _mm512_cvtepi32_epi8(to_int(mul(load(x[r] + i), set1(factors[r]))));
            rows[r] = _mm_xor_si128(codes, _mm_set1_epi8(-128));  // + 128
        }
        const __m128i low[2] = {_mm_unpacklo_epi32(rows[0], rows[1]), _mm_unpacklo_epi32(rows[2], rows[3])};
        const __m128i high[2] = {_mm_unpackhi_epi32(rows[0], rows[1]), _mm_unpackhi_epi32(rows[2], rows[3])};
        const auto put = [&](int64_t group, __m128i four) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (i + group * INT8_STEP) * num_rows), four);
        };
        put(0, _mm_unpacklo_epi64(low[0], low[1]));
        put(1, _mm_unpackhi_epi64(low[0], low[1]));
        put(2, _mm_unpacklo_epi64(high[0], high[1]));
        put(3, _mm_unpackhi_epi64(high[0], high[1]));
    }
#endif
    return i;
}

// Blocks of k: what is written stays in the nearest cache until all rows have written there.
void transpose(const RowSource& source, int64_t first, int num_rows, int64_t k, float* out) {
    constexpr int64_t AT_ONCE = 64;
    for (int64_t start = 0; start < k; start += AT_ONCE)
        for (int r = 0; r < num_rows; ++r) {
            const float* x = source.row(first + r, k);
            for (int64_t i = start; i < std::min(k, start + AT_ONCE); ++i) out[i * num_rows + r] = x[i];
        }
}

int64_t round_up(int64_t n) { return (n + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

}  // namespace

void* scratch(int slot, int64_t num_bytes) {
    struct Buffers {
        void* data[NUM_SLOTS] = {};
        int64_t size[NUM_SLOTS] = {};
        ~Buffers() {
            for (void* p : data) std::free(p);
        }
    };
    thread_local Buffers buffers;
    if (buffers.size[slot] < num_bytes) {
        std::free(buffers.data[slot]);
        buffers.size[slot] = 0;
        buffers.data[slot] = std::aligned_alloc(ALIGNMENT, static_cast<size_t>(round_up(num_bytes)));
        if (!buffers.data[slot]) throw std::bad_alloc();
        buffers.size[slot] = num_bytes;
    }
    return buffers.data[slot];
}

int64_t packed_rows_bytes(const Weights& w, int64_t num_rows) {
    if (w.kind != Kind::INT8) return num_rows * w.k * static_cast<int64_t>(sizeof(float));
    const int64_t codes = num_rows * int8_row_len(w.k) * static_cast<int64_t>(sizeof(Int8Row));
    return round_up(codes) + num_rows * static_cast<int64_t>(sizeof(float));
}

// A single row of floats is its own transpose: it stays where it is, and is only read there.
PackedRows lay_out_rows(const Weights& w, const RowSource& source, int64_t num_rows, void* memory) {
    if (w.kind != Kind::INT8) {
        float* floats = num_rows == 1 ? const_cast<float*>(source.row(0, w.k)) : static_cast<float*>(memory);
        return {num_rows, floats, nullptr, nullptr};
    }
    const int64_t code_bytes = round_up(num_rows * int8_row_len(w.k) * static_cast<int64_t>(sizeof(Int8Row)));
    float* scales = reinterpret_cast<float*>(static_cast<char*>(memory) + code_bytes);
    return {num_rows, nullptr, static_cast<Int8Row*>(memory), scales};
}

void pack_tile(const Weights& w, const RowSource& source, const PackedRows& rows, int64_t tile) {
    const int64_t first = tile * MAX_ROWS, row_len = int8_row_len(w.k);
    const int num_rows = rows.rows_in(tile);
    if (rows.codes) {
        const float* x[MAX_ROWS];
        float factors[MAX_ROWS];
        for (int r = 0; r < num_rows; ++r) {
            x[r] = source.row(first + r, w.k);
            const float most = largest(x[r], w.k);
            factors[r] = most > 0 ? 127.0f / most : 0.0f;
            rows.scales[first + r] = most / 127.0f;
        }
        Int8Row* out = rows.codes + first * row_len;
        for (int start = 0; start < num_rows; start += 4) {
            const int end = std::min(start + 4, num_rows);
            const int64_t done = end - start == 4 ? quantize_four(x + start, factors + start, w.k, out + start * INT8_STEP, num_rows) : 0;
            for (int r = start; r < end; ++r) quantize_row(x[r], factors[r], done, w.k, out + r * INT8_STEP, num_rows);
        }
    } else if (rows.num_rows > 1) {
        transpose(source, first, num_rows, w.k, rows.floats + first * w.k);
    }
}

void multiply_panel(const Weights& w, const PackedRows& rows, int64_t panel, int64_t first, int64_t last, float* out,
                    int64_t out_stride, const float* residual) {
    const int64_t num_features = std::min(w.features_per_panel(), w.n - panel * w.features_per_panel());
    const Finish finish{w, panel, num_features, out, out_stride, residual};
    switch (w.kind) {
        case Kind::F32: return multiply_floats(F32Panel(w, panel), rows, w.k, first, last, finish);
        case Kind::BF16: return multiply_stored<HalfPanel<load_bf16>>(w, rows, panel, first, last, finish);
        case Kind::F16: return multiply_stored<HalfPanel<load_f16>>(w, rows, panel, first, last, finish);
        case Kind::CODES4: return multiply_stored<Codes4Panel>(w, rows, panel, first, last, finish);
        case Kind::CODES8: return multiply_stored<Codes8Panel>(w, rows, panel, first, last, finish);
        case Kind::INT8: return multiply_int8(w, rows, panel, first, last, finish);
    }
}
