// The innermost loops: one tile of rows times one panel of weights.
#pragma once

#include "matmul.h"

// ---- how each kind of weight becomes floats. `load(k, b)` gives the STEP rows of the panel that start at k.

struct F32Panel {
    static constexpr int64_t STEP = 1;
    const float* data;
    int64_t k, group_size;
    F32Panel(const Weights& w, int64_t panel) : F32Panel(static_cast<const float*>(w.data) + panel * w.k * PANEL, w.k) {}
    F32Panel(const float* panel_data, int64_t k_) : data(panel_data), k(k_), group_size(k_) {}
    void start_group(int64_t) {}
    template <int HALVES>
    void load(int64_t row, int half, vf (*b)[HALVES]) const {
        for (int h = 0; h < HALVES; ++h) b[0][h] = ::load(data + row * PANEL + (half + h) * LANES);
    }
};

template <vf (*LOAD)(const uint16_t*)>
struct HalfPanel {
    static constexpr int64_t STEP = 1;
    const uint16_t* data;
    int64_t k, group_size;
    HalfPanel(const Weights& w, int64_t panel)
        : data(static_cast<const uint16_t*>(w.data) + panel * w.k * PANEL), k(w.k), group_size(w.k) {}
    void start_group(int64_t) {}
    template <int HALVES>
    void load(int64_t row, int half, vf (*b)[HALVES]) const {
        for (int h = 0; h < HALVES; ++h) b[0][h] = LOAD(data + row * PANEL + (half + h) * LANES);
    }
};

struct GroupScales {
    const float *scales, *offsets;
    vf scale[2], offset[2];
    GroupScales(const Weights& w, int64_t panel) {
        const int64_t start = panel * (w.k / w.group_size) * PANEL;
        scales = w.scales + start;
        offsets = w.offsets + start;
    }
    void start(int64_t group) {
        for (int h = 0; h < 2; ++h) {
            scale[h] = load(scales + group * PANEL + h * LANES);
            offset[h] = load(offsets + group * PANEL + h * LANES);
        }
    }
    vf value(vf code, int h) const { return fma(code, scale[h], offset[h]); }
};

struct Codes8Panel {
    static constexpr int64_t STEP = 1;
    const int8_t* data;
    int64_t k, group_size;
    GroupScales groups;
    Codes8Panel(const Weights& w, int64_t panel)
        : data(static_cast<const int8_t*>(w.data) + panel * w.k * PANEL), k(w.k), group_size(w.group_size), groups(w, panel) {}
    void start_group(int64_t group) { groups.start(group); }
    template <int HALVES>
    void load(int64_t row, int half, vf (*b)[HALVES]) const {
        for (int h = 0; h < HALVES; ++h) b[0][h] = groups.value(load_i8(data + row * PANEL + (half + h) * LANES), half + h);
    }
};

// Sixteen bytes as the floats of their low and of their high halves, 0 to 15.
inline void load_nibbles(const uint8_t* p, vf& low, vf& high) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
#if defined(__AVX512F__)
    const __m512 floats = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i wide = _mm512_cvtepu8_epi32(bytes);
    low = _mm512_permutexvar_ps(wide, floats);  // looks at the lowest four bits alone
    high = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), floats);
#else
    const __m256i mask = _mm256_set1_epi32(15);
    const __m256i wide[2] = {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
    low = {_mm256_cvtepi32_ps(_mm256_and_si256(wide[0], mask)), _mm256_cvtepi32_ps(_mm256_and_si256(wide[1], mask))};
    high = {_mm256_cvtepi32_ps(_mm256_srli_epi32(wide[0], 4)), _mm256_cvtepi32_ps(_mm256_srli_epi32(wide[1], 4))};
#endif
}

struct Codes4Panel {
    static constexpr int64_t STEP = 2;
    const uint8_t* data;
    int64_t k, group_size;
    GroupScales groups;
    Codes4Panel(const Weights& w, int64_t panel)
        : data(static_cast<const uint8_t*>(w.data) + panel * (w.k / 2) * PANEL), k(w.k), group_size(w.group_size), groups(w, panel) {}
    void start_group(int64_t group) { groups.start(group); }
    template <int HALVES>
    void load(int64_t row, int half, vf (*b)[HALVES]) const {
        for (int h = 0; h < HALVES; ++h) {
            vf low, high;
            load_nibbles(data + row / 2 * PANEL + (half + h) * LANES, low, high);
            b[0][h] = groups.value(low, half + h);
            b[1][h] = groups.value(high, half + h);
        }
    }
};

// ---- floats: a [K][ROWS] times a panel, into out [ROWS][PANEL]

template <int ROWS, int HALVES, class Panel>
inline void float_tile_half(const float* a, Panel& w, int half, float* out) {
    vf sums[ROWS][HALVES];
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < HALVES; ++h) sums[r][h] = zero();
    for (int64_t start = 0, group = 0; start < w.k; start += w.group_size, ++group) {
        w.start_group(group);
        for (int64_t row = start; row < start + w.group_size; row += Panel::STEP) {
            vf b[Panel::STEP][HALVES];
            w.template load<HALVES>(row, half, b);
            for (int64_t s = 0; s < Panel::STEP; ++s)
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; ++r) {
                    const vf x = set1(a[(row + s) * ROWS + r]);
                    for (int h = 0; h < HALVES; ++h) sums[r][h] = fma(x, b[s][h], sums[r][h]);
                }
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int h = 0; h < HALVES; ++h) store(out + r * PANEL + (half + h) * LANES, sums[r][h]);
}

template <int ROWS, class Panel>
inline void float_tile(const float* a, Panel w, float* out) {
#if defined(__AVX512F__)
    float_tile_half<ROWS, 2>(a, w, 0, out);
#else
    float_tile_half<ROWS, 1>(a, w, 0, out);
    float_tile_half<ROWS, 1>(a, w, 1, out);
#endif
}

// ---- integers: a [K / step][ROWS][step] times a panel, into out [ROWS][PANEL]

#if defined(__AVX512F__)
using IntSums = __m512i;
constexpr int SUMS_PER_PANEL = 2;
inline IntSums no_sums() { return _mm512_setzero_si512(); }
inline void store_sums(int32_t* p, IntSums x) { _mm512_storeu_si512(p, x); }
#else
using IntSums = __m256i;
constexpr int SUMS_PER_PANEL = 4;
inline IntSums no_sums() { return _mm256_setzero_si256(); }
inline void store_sums(int32_t* p, IntSums x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
#endif
constexpr int COLUMNS_PER_SUM = static_cast<int>(PANEL) / SUMS_PER_PANEL;

inline IntSums load_codes(const int8_t* p) {
#if defined(__AVX512VNNI__)
    return _mm512_loadu_si512(p);
#elif defined(__AVX512F__)
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}

inline IntSums add_products(IntSums sums, const Int8Row* a, IntSums b) {
    int32_t few;
    std::memcpy(&few, a, sizeof few);
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(few), b);
#elif defined(__AVX512F__)
    return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_set1_epi32(few), b));
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_set1_epi32(few), b));
#endif
}

// meanwhile(i) is called for each i below MAX_ROWS at even intervals: what it does fills the gaps of the loop.
template <int ROWS, int SUMS, class Meanwhile>
inline void int_tile_part(const Int8Row* a, const int8_t* w, int64_t num_steps, int first, int32_t* out, const Meanwhile& meanwhile) {
    IntSums sums[ROWS][SUMS];
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SUMS; ++s) sums[r][s] = no_sums();
    const int64_t pace = num_steps / MAX_ROWS;
    int64_t step = 0;
    for (int call = 0; call <= MAX_ROWS; ++call) {
        const int64_t end = call < MAX_ROWS ? (call + 1) * pace : num_steps;
        for (; step < end; ++step) {
            IntSums b[SUMS];
            for (int s = 0; s < SUMS; ++s) b[s] = load_codes(w + (step * PANEL + (first + s) * COLUMNS_PER_SUM) * INT8_STEP);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r)
                for (int s = 0; s < SUMS; ++s) sums[r][s] = add_products(sums[r][s], a + (step * ROWS + r) * INT8_STEP, b[s]);
        }
        if (call < MAX_ROWS) meanwhile(call);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < SUMS; ++s) store_sums(out + r * PANEL + (first + s) * COLUMNS_PER_SUM, sums[r][s]);
}

template <int ROWS, class Meanwhile>
inline void int_tile(const Int8Row* a, const int8_t* w, int64_t num_steps, int32_t* out, const Meanwhile& meanwhile) {
    int_tile_part<ROWS, 2>(a, w, num_steps, 0, out, meanwhile);
    for (int first = 2; first < SUMS_PER_PANEL; first += 2) int_tile_part<ROWS, 2>(a, w, num_steps, first, out, [](int) {});
}
