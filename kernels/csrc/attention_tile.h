// The two products of attention, as register tiles that read the cache in its own type.
//
// Each element of a result is one chain of fused multiply-adds, over the head's elements or over the positions in order:
// it comes out the same whatever tile it is computed in.
#pragma once

#include "kv_types.h"

// What is loaded once stays in a register: the compiler would rather read it again for each row.
#if defined(__AVX512F__)
constexpr int ACCUMULATORS = 16;  // of 32 registers
inline void keep(vf& x) { asm("" : "+v"(x)); }
#else
constexpr int ACCUMULATORS = 4;  // pairs of 16 registers
inline void keep(vf& x) { asm("" : "+x"(x.lo), "+x"(x.hi)); }
#endif

constexpr int ROWS_AT_ONCE = ACCUMULATORS / 2;

// logits[r][i] = q[r] . K[i] for 16 positions i in each of N blocks of columns.
// q: ROWS rows of `size`, one after the other; keys[n]: [size, 16] with `stride` between rows, ahead[n] like it, what comes
// next, is fetched where AHEAD; logits: `width` between rows.
template <class T, int ROWS, int N, bool AHEAD>
inline void multiply_keys(const float* q, int64_t size, const typename T::Item* const* keys, const typename T::Item* const* ahead,
                          int64_t stride, float* logits, int64_t width) {
    vf sums[ROWS][N];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * N; ++i) sums[i / N][i % N] = zero();
    for (int64_t d = 0; d < size; ++d) {
        vf column[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            column[n] = T::load16(keys[n] + d * stride);
            keep(column[n]);
            if constexpr (AHEAD) _mm_prefetch(ahead[n] + d * stride, _MM_HINT_T1);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const vf element = set1(q[r * size + d]);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sums[r][n] = fma(element, column[n], sums[r][n]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * N; ++i) store(logits + i / N * width + i % N * LANES, sums[i / N][i % N]);
}

// out[r] = out[r] * factors[r] + sum over positions of weights[r][i] V[i], for N vectors of V's elements.
// values[b]: [16, size] with `stride` between rows, ahead[b] like it; `count` positions in all; weights, out: `width`,
// `out_width` between rows.
template <class T, int ROWS, int N, bool AHEAD>
inline void multiply_values(const float* weights, int64_t width, const typename T::Item* const* values,
                            const typename T::Item* const* ahead, int64_t stride, int64_t count, const float* factors,
                            int64_t first, float* out, int64_t out_width) {
    vf sums[ROWS][N];
    out += first;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * N; ++i)
        sums[i / N][i % N] = mul(load(out + i / N * out_width + i % N * LANES), set1(factors[i / N]));
    for (int64_t start = 0; start < count; start += LANES) {
        const typename T::Item* row = values[start / LANES] + first;
        const int64_t to_next = AHEAD ? ahead[start / LANES] - values[start / LANES] : 0;
        const int64_t end = start + LANES < count ? start + LANES : count;
        for (int64_t i = start; i < end; ++i, row += stride) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {  // vector by vector: an array of them would go through memory
                vf elements = T::load16(row + n * LANES);
                keep(elements);
                if constexpr (AHEAD) _mm_prefetch(row + to_next + n * LANES, _MM_HINT_T1);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) sums[r][n] = fma(elements, set1(weights[r * width + i]), sums[r][n]);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * N; ++i) store(out + i / N * out_width + i % N * LANES, sums[i / N][i % N]);
}

// Calls body.template operator()<ROWS>() for the number of rows, 1 to ROWS_AT_ONCE.
template <int ROWS = ROWS_AT_ONCE, class Body>
inline void with_rows(int num_rows, Body&& body) {
    if constexpr (ROWS == 1) {
        body.template operator()<1>();
    } else if (num_rows == ROWS) {
        body.template operator()<ROWS>();
    } else {
        with_rows<ROWS - 1>(num_rows, body);
    }
}
