// Angles of rotary positions. Each is computed alone, so that a position has the same ones in every step.
#include <algorithm>
#include <cmath>

#include "pool.h"

namespace {

constexpr int64_t TOKENS_AT_ONCE = 32;

}

// positions: [T]; frequencies: [half]; cos, sin: [T, half], times `factor`.
extern "C" EXPORT void penstock_rope_angles(const int64_t* positions, int64_t num_tokens, const float* frequencies, int64_t half,
                                            float factor, float* cos, float* sin) {
    pool::parallel_for((num_tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, [&](int64_t item) {
        for (int64_t t = item * TOKENS_AT_ONCE; t < std::min(num_tokens, (item + 1) * TOKENS_AT_ONCE); ++t)
            for (int64_t i = 0; i < half; ++i) {
                const float angle = static_cast<float>(positions[t]) * frequencies[i];
                cos[t * half + i] = std::cos(angle) * factor;
                sin[t * half + i] = std::sin(angle) * factor;
            }
    });
}
