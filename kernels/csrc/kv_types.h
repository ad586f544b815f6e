// The types that a KV cache may hold, to and from floats: sixteen at a time, and one. `SCALED`: a vector is its
// items times a scale.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

enum class KVType : int32_t { F32, BF16, F16, I8 };

struct F32 {
    using Item = float;
    static constexpr bool SCALED = false;
    static vf load16(const Item* p) { return load(p); }
    static float load1(const Item* p) { return *p; }
    static Item round1(float x) { return x; }
};

struct BF16 {
    using Item = uint16_t;
    static constexpr bool SCALED = false;
    static vf load16(const Item* p) { return load_bf16(p); }
    static float load1(const Item* p) {
        const uint32_t bits = uint32_t{*p} << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
    static Item round1(float x) {  // half to even
        if (std::isnan(x)) return 0x7fc0;
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return static_cast<Item>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
};

struct F16 {
    using Item = uint16_t;
    static constexpr bool SCALED = false;
    static vf load16(const Item* p) { return load_f16(p); }
    static float load1(const Item* p) { return _cvtsh_ss(*p); }
    static Item round1(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
};

struct I8 {
    using Item = int8_t;
    static constexpr bool SCALED = true;
    static vf load16(const Item* p) { return load_i8(p); }
    static float load1(const Item* p) { return *p; }
};

// Calls body(T{}) for the type T that `type` names.
template <class Body>
inline void with_type(KVType type, Body&& body) {
    switch (type) {
        case KVType::F32: return body(F32{});
        case KVType::BF16: return body(BF16{});
        case KVType::F16: return body(F16{});
        case KVType::I8: return body(I8{});
    }
}

// Rounds a vector to items, as `quantize_rows` of kernels/quantize.py does to int8; returns its scale, else 1.
template <class T>
inline float encode(const float* x, int64_t size, typename T::Item* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = T::round1(x[i]);
    return 1.0f;
}

template <>
inline float encode<I8>(const float* x, int64_t size, int8_t* out) {
    float largest = 0;
    for (int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
    const float factor = largest > 0 ? 127.0f / largest : 0.0f;
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<int8_t>(std::nearbyintf(x[i] * factor));
    return largest / 127.0f;
}
