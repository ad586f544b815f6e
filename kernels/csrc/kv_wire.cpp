// Vectors of K and V to int8 with a scale each, and back, as kernels/kv_wire.py says. On the calling thread alone: a
// channel's thread that widens what has come must not make the engine's loops wait.
#include <vector>

#include "kv_types.h"
#include "pool.h"

extern "C" {

// x: [num_vectors, size] of `type`, not int8; codes: [num_vectors, size]; scales: [num_vectors].
EXPORT void penstock_round_kv(const void* x, int64_t num_vectors, int64_t size, KVType type, int8_t* codes,
                              float* scales) {
    with_type(type, [&]<class T>(T) {
        std::vector<float> wide(static_cast<size_t>(size));
        for (int64_t vector = 0; vector < num_vectors; ++vector) {
            const auto* from = static_cast<const typename T::Item*>(x) + vector * size;
            int64_t i = 0;
            for (; i + LANES <= size; i += LANES) store(wide.data() + i, T::load16(from + i));
            for (; i < size; ++i) wide[static_cast<size_t>(i)] = T::load1(from + i);
            scales[vector] = encode<I8>(wide.data(), size, codes + vector * size);
        }
    });
}

// The way back: code * scale, rounded to `type`.
EXPORT void penstock_widen_kv(const int8_t* codes, const float* scales, int64_t num_vectors, int64_t size, KVType type,
                              void* out) {
    with_type(type, [&]<class T>(T) {
        if constexpr (!T::SCALED) {
            auto* to = static_cast<typename T::Item*>(out);
            for (int64_t vector = 0; vector < num_vectors; ++vector, codes += size, to += size)
                for (int64_t i = 0; i < size; ++i) to[i] = T::round1(static_cast<float>(codes[i]) * scales[vector]);
        }
    });
}
}
