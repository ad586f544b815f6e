// Rows of logits to tokens, and to log-probabilities. The reference is kernels/sampling.py, and the two agree bit for
// bit: weights of tokens are integers, whose sums don't depend on an order, and the exponential is the same short
// sequence of float32 operations in both, none of them fused.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <memory>
#include <vector>

#include "pool.h"
#include "selection.h"

namespace {

struct Row {  // as ROW in kernels/sampling.py
    float temperature, repetition, frequency, presence;
    double top_p;
    int64_t top_k, min_weight;
    uint64_t seed, position;
    int64_t history_start, history_end, num_prompt, mask;
};
static_assert(sizeof(Row) == 88);

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double FULL = 17592186044416.0;  // 2^44, the weight of the best token
constexpr int64_t CHUNK = 256;

// ---- what a row of logits may not be, and what it is made less likely to be

void mask_row(float* x, int64_t size, const uint32_t* mask) {
    for (int64_t i = 0; i < size; ++i) {
        if (!(mask[i >> 5] >> (i & 31) & 1)) x[i] = -INF;
    }
}

// `counts` [size] is zero before and after.
void penalize_row(float* x, const Row& row, const int32_t* history, std::vector<int32_t>& counts) {
    const int32_t *begin = history + row.history_start, *end = history + row.history_end;
    if (row.repetition != 1.0f) {
        for (const int32_t* p = begin; p != end; ++p) {
            if (counts[*p]++ == 0) x[*p] = x[*p] > 0.0f ? x[*p] / row.repetition : x[*p] * row.repetition;
        }
        for (const int32_t* p = begin; p != end; ++p) counts[*p] = 0;
    }
    const int32_t* output = begin + row.num_prompt;
    if ((row.frequency == 0.0f && row.presence == 0.0f) || output >= end) return;
    for (const int32_t* p = output; p != end; ++p) ++counts[*p];
    for (const int32_t* p = output; p != end; ++p) {
        if (counts[*p] == 0) continue;
        const float often = row.frequency * static_cast<float>(counts[*p]);
        x[*p] = (x[*p] - often) - row.presence;
        counts[*p] = 0;
    }
}

// ---- weights

float best_of(const float* x, int64_t size) {
    constexpr int WIDTH = 64;
    float best[WIDTH];
    std::fill(best, best + WIDTH, -INF);
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) {
        for (int j = 0; j < WIDTH; ++j) best[j] = x[i + j] > best[j] ? x[i + j] : best[j];
    }
    for (; i < size; ++i) best[0] = x[i] > best[0] ? x[i] : best[0];
    return *std::max_element(best, best + WIDTH);
}

// Adding 1.5 * 2^52 leaves the nearest integer, ties to even, in the low bits of a double.
constexpr double MAGIC = 6755399441055744.0;

inline int64_t weight(float logit, float best, float sharpness) {
    // From -40 on down the weight rounds to 0. No logit is above the best, so the sign is known, and the bits of floats
    // that are not negative, not-a-number last, are in the order of the floats.
    const uint32_t depth = std::bit_cast<uint32_t>((logit - best) * sharpness) & 0x7fffffff;
    const float z = -std::bit_cast<float>(std::min(depth, std::bit_cast<uint32_t>(40.0f)));
    const float n = __builtin_rintf(z * 1.44269502162933349609375f);
    const float r = (z - n * 0.693145751953125f) - n * 1.428606765330187045037746429443359375e-06f;
    float p = 0.00138888892251998186f;
    p = p * r + 0.00833333376795053482f;
    p = p * r + 0.0416666679084300995f;
    p = p * r + 0.16666667163372039795f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float scale = std::bit_cast<float>((static_cast<int32_t>(n) + 127 + 44) << 23);
    const double w = static_cast<double>(p * scale) + MAGIC;
    return std::bit_cast<int64_t>(w) - std::bit_cast<int64_t>(MAGIC);
}

int64_t weigh(const float* x, int64_t size, float best, float sharpness, int64_t min_weight, int64_t* weights) {
    int64_t total = 0;
    for (int64_t i = 0; i < size; ++i) {
        const int64_t w = weight(x[i], best, sharpness);
        weights[i] = w < min_weight ? 0 : w;
        total += weights[i];
    }
    return total;
}

// ---- top-k and top-p

int64_t share(int64_t total, double part) {
    return std::min(static_cast<int64_t>(std::ceil(static_cast<double>(total) * part)), total);
}

// ---- the draw

// Philox4x32-10, as kernels/philox.py.
double uniform(uint64_t seed, uint64_t position) {
    uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), 0, 0};
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
        std::memcpy(c, next, sizeof c);
        key[0] += 0x9E3779B9, key[1] += 0xBB67AE85;
    }
    const uint64_t bits = (uint64_t{c[0]} >> 5 << 26) | (c[1] >> 6);
    return std::ldexp(static_cast<double>(bits), -53);
}

int64_t draw(const int64_t* weights, int64_t size, const Limit& limit, double u) {
    const auto kept = [&](int64_t i) {
        return weights[i] > limit.weight || (weights[i] == limit.weight && i <= limit.last_id) ? weights[i] : 0;
    };
    const int64_t target = std::min(static_cast<int64_t>(u * static_cast<double>(limit.total)), limit.total - 1);
    int64_t sum = 0;
    for (int64_t start = 0; start < size; start += CHUNK) {
        const int64_t end = std::min(start + CHUNK, size);
        const int64_t least = limit.weight + (start > limit.last_id);
        int64_t chunk = 0;
        if (start <= limit.last_id && limit.last_id < end - 1) {
            for (int64_t i = start; i < end; ++i) chunk += kept(i);
        } else {
            for (int64_t i = start; i < end; ++i) chunk += weights[i] >= least ? weights[i] : 0;
        }
        for (int64_t i = start; sum + chunk > target && i < end; ++i) {
            if ((sum += kept(i)) > target) return i;
        }
        sum += chunk;
    }
    return -1;
}

struct Scratch {
    std::vector<int64_t> weights;
    std::vector<int32_t> counts;
    Selection selection;
};

int64_t sample_row(float* x, int64_t size, const Row& row, const int32_t* history, const uint32_t* mask, Scratch& s) {
    if (mask != nullptr) mask_row(x, size, mask);
    if (row.history_end > row.history_start) {
        s.counts.resize(static_cast<size_t>(size), 0);
        penalize_row(x, row, history, s.counts);
    }
    const float best = best_of(x, size);
    if (best == -INF) return -1;
    if (row.temperature == 0.0f) return std::find(x, x + size, best) - x;
    s.weights.resize(static_cast<size_t>(size));
    int64_t* weights = s.weights.data();
    const float sharpness = 1.0f / std::max(row.temperature, std::numeric_limits<float>::min());
    Limit limit;
    limit.total = weigh(x, size, best, sharpness, row.min_weight, weights);
    if (row.top_k < size) limit = s.selection.best(weights, size, limit, row.top_k, limit.total);
    if (row.top_p < 1.0) limit = s.selection.best(weights, size, limit, row.top_k, share(limit.total, row.top_p));
    return draw(weights, size, limit, uniform(row.seed, row.position));
}

// ---- log-probabilities

void logprobs_row(const float* x, int64_t size, int64_t token, int64_t num_top, float* values, int64_t* ids,
                  int64_t* rank) {
    const float best = best_of(x, size);
    int64_t total = 0, num_better = 0;
    for (int64_t i = 0; i < size; ++i) total += weight(x[i], best, 1.0f);
    for (int64_t i = 0; i < size; ++i) num_better += x[i] > x[token];
    for (int64_t i = 0; i < token; ++i) num_better += x[i] == x[token];
    const double log_sum = std::log(static_cast<double>(total) / FULL);
    const auto value = [&](int64_t i) { return static_cast<float>(static_cast<double>(x[i] - best) - log_sum); };
    *rank = 1 + num_better;
    values[0] = value(token), ids[0] = token;
    int64_t* top = ids + 1;
    int64_t num = 0;
    for (int64_t i = 0; i < size && num_top > 0; ++i) {
        if (num == num_top && i % CHUNK == 0) {
            while (i < size && best_of(x + i, std::min(CHUNK, size - i)) <= x[top[num - 1]]) i += CHUNK;
            if (i >= size) break;
        }
        if (num == num_top && !(x[i] > x[top[num - 1]])) continue;
        int64_t place = num == num_top ? num - 1 : num++;
        for (; place > 0 && x[i] > x[top[place - 1]]; --place) top[place] = top[place - 1];
        top[place] = i;
    }
    for (int64_t i = 0; i < num; ++i) values[1 + i] = value(top[i]);
}

}  // namespace

// logits [num_rows, size], changed; masks [M, ceil(size / 32)]; tokens [num_rows]: -1 where nothing can be drawn.
extern "C" EXPORT void penstock_sample(float* logits, int64_t num_rows, int64_t size, const void* rows,
                                       const int32_t* history, const uint32_t* masks, int64_t* tokens) {
    pool::parallel_for(num_rows, [&](int64_t i) {
        // Behind a pointer: else the compiler asks for its address anew in every inner loop.
        static thread_local const auto scratch = std::make_unique<Scratch>();
        const Row& row = static_cast<const Row*>(rows)[i];
        const uint32_t* mask = row.mask < 0 ? nullptr : masks + row.mask * ((size + 31) / 32);
        tokens[i] = sample_row(logits + i * size, size, row, history, mask, *scratch);
    });
}

// values, ids [num_rows, 1 + num_top]: those of `tokens`, then the best; ranks [num_rows].
extern "C" EXPORT void penstock_logprobs(const float* logits, int64_t num_rows, int64_t size, const int64_t* tokens,
                                         int64_t num_top, float* values, int64_t* ids, int64_t* ranks) {
    pool::parallel_for(num_rows, [&](int64_t i) {
        const int64_t start = i * (1 + num_top);
        logprobs_row(logits + i * size, size, tokens[i], num_top, values + start, ids + start, ranks + i);
    });
}
