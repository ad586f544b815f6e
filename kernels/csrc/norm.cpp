// Root mean square layer normalisation.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace {

constexpr int64_t ROWS_AT_ONCE = 8;

void normalize_row(const float* x, const float* weight, float eps, int64_t size, float* out) {
    vf squares = zero();
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const int tail = static_cast<int>(size - i);
    if (tail > 0) {
        const vf last = load_first(x + i, tail);
        squares = fma(last, last, squares);
    }
    const vf factor = set1(1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + eps));
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, mul(mul(load(x + i), factor), load(weight + i)));
    if (tail > 0) store_first(out + i, mul(mul(load_first(x + i, tail), factor), load_first(weight + i, tail)), tail);
}

}  // namespace

// x, out: [num_rows, size]; row r is weighed by weight[r % num_weights], weight: [num_weights, size].
extern "C" EXPORT void penstock_rms_norm(const float* x, const float* weight, int64_t num_weights, float eps,
                                         int64_t num_rows, int64_t size, float* out) {
    pool::parallel_for((num_rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, [&](int64_t item) {
        for (int64_t row = item * ROWS_AT_ONCE; row < std::min(num_rows, (item + 1) * ROWS_AT_ONCE); ++row)
            normalize_row(x + row * size, weight + row % num_weights * size, eps, size, out + row * size);
    });
}
