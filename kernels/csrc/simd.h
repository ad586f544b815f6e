// Sixteen floats at a time, on AVX-512 as one register and on AVX2 as two. Every multiplication that feeds an addition
// is an explicit fused multiply-add, so that a kernel rounds the same wherever it is called from.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

constexpr int LANES = 16;

#if defined(__AVX512F__)

using vf = __m512;
using vi = __m512i;

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float x) { return _mm512_set1_ps(x); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline vf load_first(const float* p, int n) { return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p); }
inline void store_first(float* p, vf x, int n) { _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), x); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf div(vf a, vf b) { return _mm512_div_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf abs(vf a) { return _mm512_abs_ps(a); }
inline vf round_even(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline vi to_int(vf a) { return _mm512_cvtps_epi32(a); }
inline vf to_float(vi a) { return _mm512_cvtepi32_ps(a); }
inline vi shift_left(vi a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
inline vi add(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi subtract(vi a, vi b) { return _mm512_sub_epi32(a, b); }
inline vi set1(int32_t x) { return _mm512_set1_epi32(x); }
inline void store(int32_t* p, vi x) { _mm512_storeu_si512(p, x); }
inline vi load(const int32_t* p) { return _mm512_loadu_si512(p); }
inline vf as_float(vi a) { return _mm512_castsi512_ps(a); }
inline vf load_bf16(const uint16_t* p) {
    return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline vf load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline vf load_i8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// Lane i of `a` where a[i] > b[i] holds, else of `otherwise`.
inline vf select_greater(vf a, vf b, vf then, vf otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), otherwise, then);
}

#else

struct vf {
    __m256 lo, hi;
};
struct vi {
    __m256i lo, hi;
};

inline vf zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline vf set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline vf load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x.lo), _mm256_storeu_ps(p + 8, x.hi); }
inline vf load_first(const float* p, int n) {
    alignas(32) float padded[LANES] = {};
    std::memcpy(padded, p, sizeof(float) * static_cast<size_t>(n));
    return load(padded);
}
inline void store_first(float* p, vf x, int n) {
    alignas(32) float padded[LANES];
    store(padded, x);
    std::memcpy(p, padded, sizeof(float) * static_cast<size_t>(n));
}
inline vf add(vf a, vf b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline vf sub(vf a, vf b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline vf mul(vf a, vf b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline vf div(vf a, vf b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline vf fma(vf a, vf b, vf c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline vf max(vf a, vf b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline vf min(vf a, vf b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline vf abs(vf a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline vf round_even(vf a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
inline vi to_int(vf a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline vf to_float(vi a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline vi shift_left(vi a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
inline vi add(vi a, vi b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline vi subtract(vi a, vi b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
inline vi set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline void store(int32_t* p, vi x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.hi);
}
inline vi load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline vf as_float(vi a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline __m256 load8_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline vf load_bf16(const uint16_t* p) { return {load8_bf16(p), load8_bf16(p + 8)}; }
inline vf load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline vf load_i8(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline vf select_greater(vf a, vf b, vf then, vf otherwise) {
    return {_mm256_blendv_ps(otherwise.lo, then.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ)),
            _mm256_blendv_ps(otherwise.hi, then.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ))};
}

#endif

// x 2^n, but 0 where a > b holds. n: whole numbers of which 2^n is a normal float.
inline vf scale_unless_greater(vf a, vf b, vf x, vf n) {
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ), x, n);
#else
    const vf power = as_float(shift_left(add(to_int(n), set1(int32_t{127})), 23));
    return select_greater(a, b, zero(), mul(x, power));
#endif
}

#if defined(__AVX512F__)
inline __m256 low_half(vf x) { return _mm512_castps512_ps256(x); }
inline __m256 high_half(vf x) { return _mm512_extractf32x8_ps(x, 1); }
#else
inline __m256 low_half(vf x) { return x.lo; }
inline __m256 high_half(vf x) { return x.hi; }
#endif

// Lanes put together by halves, always in this order: sixteen, eight, four, two.
template <class Op256, class Op128>
inline float fold_lanes(vf x, Op256 wide, Op128 narrow) {
    const __m256 eight = wide(low_half(x), high_half(x));
    __m128 four = narrow(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = narrow(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(narrow(four, _mm_shuffle_ps(four, four, 1)));
}

inline float sum_lanes(vf x) {
    return fold_lanes(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}

inline float max_lanes(vf x) {
    return fold_lanes(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); }, [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

// e^x to about one unit in the last place. Below -87.3 it is 0; x above 88.3 is taken as 88.3. x = n ln 2 + r with
// |r| <= ln 2 / 2, and a polynomial for e^r of the least largest error, 3e-9.
inline vf exp(vf x) {
    const vf lowest = set1(-87.33654f);
    const vf limited = min(set1(88.3f), x);  // in this order not-a-number stays what it is
    const vf n = round_even(mul(limited, set1(1.44269504f)));
    vf r = fma(n, set1(-0.693359375f), limited);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(0.0013814599f);
    p = fma(p, r, set1(0.008368717f));
    p = fma(p, r, set1(0.04166839f));
    p = fma(p, r, set1(0.16666521f));
    p = fma(p, r, set1(0.49999994f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return scale_unless_greater(lowest, x, p, n);
}
