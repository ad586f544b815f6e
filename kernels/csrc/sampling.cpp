// Rows of logits to tokens, and to log-probabilities. The reference is kernels/sampling.py, and the two agree bit for
// bit: weights of tokens are integers, whose sums don't depend on an order, and the exponential is the same short
// sequence of float32 operations in both, none of them fused.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <memory>
#include <vector>

#include "pool.h"

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

// ---- top-k and top-p: the least weight that is kept, and up to which token id its equals are

struct Limit {
    int64_t weight = 1, last_id = std::numeric_limits<int64_t>::max(), total = 0;
};

struct Amount {
    int64_t count = 0, sum = 0;
};

// The best tokens until there are `max_count` of them, or they hold `needed`: cuts the range of the limit in four until
// few tokens are left in it to sort.
class Selection {
  public:
    Limit best(const int64_t* weights, int64_t size, int64_t max_count, int64_t needed) {
        const auto enough = [&](const Amount& a) { return a.count >= max_count || a.sum >= needed; };
        weights_.resize(static_cast<size_t>(size));
        ids_.resize(static_cast<size_t>(size + 16));
        int64_t low = 1, high = FULL_WEIGHT + 1;  // the limit is in [low, high)
        Amount at_low{size, 0}, above, base;      // above: `high` and more; base: what was put aside
        bool all = true;
        for (Cuts cuts = FIRST; high - low > 1 && at_low.count - above.count > FEW; cuts = between(low, high)) {
            std::array<Amount, 3> found = at_least(all ? weights : weights_.data(), all ? size : size_, cuts);
            for (size_t i = 0; i < cuts.size(); ++i) {
                found[i].count += base.count, found[i].sum += base.sum;
                if (!enough(found[i])) {
                    high = cuts[i], above = found[i];
                    break;
                }
                low = cuts[i], at_low = found[i];
            }
            if (all && at_low.count - above.count < size / 12) {
                take(weights, size, low, high);
                all = false, base = above;
            }
        }
        if (all) take(weights, size, low, high);
        return sorted(low, high, above, enough);
    }

  private:
    using Cuts = std::array<int64_t, 3>;
    static constexpr int64_t FULL_WEIGHT = int64_t{1} << 44, FEW = 32;
    static constexpr Cuts FIRST = {FULL_WEIGHT >> 14, FULL_WEIGHT >> 9, FULL_WEIGHT >> 5};

    // Even on a logarithmic scale; at least the second is inside.
    static Cuts between(int64_t low, int64_t high) {
        const double step = std::pow(static_cast<double>(high) / static_cast<double>(low), 0.25);
        Cuts cuts;
        double cut = static_cast<double>(low);
        for (int64_t& each : cuts) each = std::clamp(static_cast<int64_t>(cut *= step), low + 1, high - 1);
        return cuts;
    }

    static std::array<Amount, 3> at_least(const int64_t* weights, int64_t size, Cuts cuts) {
        const int64_t first = cuts[0], second = cuts[1], third = cuts[2];
        int64_t count1 = 0, count2 = 0, count3 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t w = weights[i];
            const int64_t w1 = w >= first ? w : 0, w2 = w >= second ? w : 0, w3 = w >= third ? w : 0;
            count1 += w1 != 0, count2 += w2 != 0, count3 += w3 != 0;
            sum1 += w1, sum2 += w2, sum3 += w3;
        }
        return {Amount{count1, sum1}, Amount{count2, sum2}, Amount{count3, sum3}};
    }

    // The tokens whose weight is in [low, high), in the order of their ids.
    void take(const int64_t* weights, int64_t size, int64_t low, int64_t high) {
        int64_t i = 0, num = 0;
        int32_t* ids = ids_.data();
#if defined(__AVX512F__)
        const __m512i least = _mm512_set1_epi64(low), limit = _mm512_set1_epi64(high);
        const auto inside = [&](int64_t start) {
            const __m512i w = _mm512_loadu_si512(weights + start);
            return _mm512_mask_cmplt_epi64_mask(_mm512_cmpge_epi64_mask(w, least), w, limit);
        };
        __m512i each = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; i + 16 <= size; i += 16) {
            const auto in = static_cast<__mmask16>(inside(i) | inside(i + 8) << 8);
            _mm512_storeu_si512(ids + num, _mm512_maskz_compress_epi32(in, each));
            num += __builtin_popcount(in);
            each = _mm512_add_epi32(each, _mm512_set1_epi32(16));
        }
#endif
        for (; i < size; ++i) {
            ids[num] = static_cast<int32_t>(i);
            num += weights[i] >= low && weights[i] < high;
        }
        size_ = num;
        for (i = 0; i < num; ++i) weights_[i] = weights[ids[i]];
    }

    // The limit is in [low, high), and `a` are those above.
    template <class Enough>
    Limit sorted(int64_t low, int64_t high, Amount a, const Enough& enough) {
        order_.clear();
        for (int64_t i = 0; i < size_; ++i) {
            if (weights_[i] >= low && weights_[i] < high) order_.push_back(i);
        }
        const auto better = [&](int64_t i, int64_t j) {
            return weights_[i] > weights_[j] || (weights_[i] == weights_[j] && i < j);
        };
        std::sort(order_.begin(), order_.end(), better);
        Limit limit;
        for (const int64_t i : order_) {
            ++a.count, a.sum += weights_[i];
            limit = {weights_[i], ids_[i], a.sum};
            if (enough(a)) break;
        }
        return limit;
    }

    std::vector<int64_t> weights_, order_;
    std::vector<int32_t> ids_;
    int64_t size_ = 0;
};

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
    if (row.top_k < size) limit = s.selection.best(weights, size, row.top_k, limit.total);
    if (row.top_p < 1.0) limit = s.selection.best(weights, size, row.top_k, share(limit.total, row.top_p));
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
