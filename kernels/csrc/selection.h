// Top-k and top-p over weights that are integers: where among them the last token is that is kept.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

// The least weight that is kept, and up to which token id its equals are; the sum of all that is kept.
struct Limit {
    int64_t weight = 1, last_id = std::numeric_limits<int64_t>::max(), total = 0;
};

struct Amount {
    int64_t count = 0, sum = 0;
};

// The best tokens until there are `max_count` of them, or they hold `needed`: cuts the range of the limit in four until
// few tokens are left in it to sort, or only equals. Where to cut first, a sample of the tokens tells.
class Selection {
  public:
    // Of the tokens within the limit `all`.
    Limit best(const int64_t* weights, int64_t size, const Limit& all, int64_t max_count, int64_t needed) {
        const auto enough = [=](const Amount& a) { return a.count >= max_count || a.sum >= needed; };
        weights_.resize(static_cast<size_t>(size));
        ids_.resize(static_cast<size_t>(size + 16));
        Range range{all.weight, FULL_WEIGHT + 1, {size, all.total}, {}};
        // Whole passes until a tenth is left; they don't help where more are equal, or nearly.
        for (int pass = all.weight > 1 ? MAX_PASSES : 0; pass < MAX_PASSES && range.count() > size / 10 && range.is_wide(); ++pass)
            narrow(range, weights, size, {}, pass == 0 ? first_cuts(weights, size, all.total, max_count, needed) : between(range), enough);
        if (range.is_wide()) take(weights, size, range);
        while (range.count() > FEW && range.is_wide()) {
            narrow(range, weights_.data(), size_, range.above, between(range), enough);
            keep(range);
        }
        return range.is_wide() ? last_of_few(range.above, enough) : last_of_equals(weights, size, range, enough);
    }

  private:
    using Cuts = std::array<int64_t, 3>;
    static constexpr int64_t FULL_WEIGHT = int64_t{1} << 44, FEW = 32, STRIDE = 16, MIN_SAMPLE = 256, FEW_OF_SAMPLE = 48, MAX_PASSES = 4;

    // The limit is in [low, high).
    struct Range {
        int64_t low, high;
        Amount at_low, above;  // `low` and more; `high` and more
        int64_t count() const { return at_low.count - above.count; }
        bool is_wide() const { return high - low > 1; }
    };

    // Even on a logarithmic scale; at least the second is inside.
    static Cuts between(const Range& range) {
        const double step = std::pow(static_cast<double>(range.high) / static_cast<double>(range.low), 0.25);
        Cuts cuts;
        double cut = static_cast<double>(range.low);
        for (int64_t& each : cuts) each = std::clamp(static_cast<int64_t>(cut *= step), range.low + 1, range.high - 1);
        return cuts;
    }

    // Cuts a range, of which `weights` are all but those that `base` counts, above them.
    template <class Enough>
    static void narrow(Range& range, const int64_t* weights, int64_t size, Amount base, Cuts cuts, const Enough& enough) {
        std::array<Amount, 3> found = at_least(weights, size, cuts);
        for (size_t i = 0; i < cuts.size(); ++i) {
            found[i].count += base.count, found[i].sum += base.sum;
            if (!enough(found[i])) {
                range.high = cuts[i], range.above = found[i];
                break;
            }
            range.low = cuts[i], range.at_low = found[i];
        }
    }

    // Around what the limit would be if all tokens were as each STRIDEth; the further, the fewer of them weigh much.
    Cuts first_cuts(const int64_t* weights, int64_t size, int64_t all, int64_t max_count, int64_t needed) {
        const int64_t num = size / STRIDE;
        if (num < MIN_SAMPLE) return FIRST;
        int64_t total = 0;
        double squares = 0;
        for (int64_t i = 0; i < num; ++i) {
            const int64_t w = weights_[static_cast<size_t>(i)] = weights[i * STRIDE];
            total += w, squares += static_cast<double>(w) * static_cast<double>(w);
        }
        const double count = static_cast<double>(max_count) / STRIDE, sum = static_cast<double>(total);
        const double part = static_cast<double>(needed) / static_cast<double>(all) * sum;
        const auto enough = [=](const Amount& a) { return static_cast<double>(a.count) >= count || static_cast<double>(a.sum) >= part; };
        Range range{1, FULL_WEIGHT + 1, {num, total}, {}};
        for (Cuts cuts = FIRST; range.count() > FEW_OF_SAMPLE && range.is_wide(); cuts = between(range))
            narrow(range, weights_.data(), num, {}, cuts, enough);
        if (range.at_low.count < FEW_OF_SAMPLE) return FIRST;
        if (!range.is_wide()) return {range.low, range.high, range.high};
        const double low = static_cast<double>(range.low), high = static_cast<double>(range.high);
        const double doubt = 2 * std::sqrt(squares) / sum, margin = high - low;
        const double least = std::min(low - margin, low / (1 + doubt)), most = std::max(high + margin, high * (1 + doubt));
        return {std::max(static_cast<int64_t>(least), int64_t{2}), static_cast<int64_t>((low + high) / 2), static_cast<int64_t>(most)};
    }

    static std::array<Amount, 3> at_least(const int64_t* weights, int64_t size, Cuts cuts) {
        const int64_t first = cuts[0], second = cuts[1], third = cuts[2];
        int64_t count1 = 0, count2 = 0, count3 = 0, sum1 = 0, sum2 = 0, sum3 = 0, i = 0;
#if defined(__AVX512F__)
        const __m512i cut1 = _mm512_set1_epi64(first), cut2 = _mm512_set1_epi64(second), cut3 = _mm512_set1_epi64(third);
        __m512i total1 = _mm512_setzero_si512(), total2 = total1, total3 = total1;
        for (; i + 8 <= size; i += 8) {
            const __m512i w = _mm512_loadu_si512(weights + i);
            const __mmask8 in1 = _mm512_cmpge_epi64_mask(w, cut1), in2 = _mm512_cmpge_epi64_mask(w, cut2), in3 = _mm512_cmpge_epi64_mask(w, cut3);
            total1 = _mm512_mask_add_epi64(total1, in1, total1, w);
            total2 = _mm512_mask_add_epi64(total2, in2, total2, w);
            total3 = _mm512_mask_add_epi64(total3, in3, total3, w);
            count1 += __builtin_popcount(in1), count2 += __builtin_popcount(in2), count3 += __builtin_popcount(in3);
        }
        sum1 = _mm512_reduce_add_epi64(total1), sum2 = _mm512_reduce_add_epi64(total2), sum3 = _mm512_reduce_add_epi64(total3);
#endif
        for (; i < size; ++i) {
            const int64_t w = weights[i];
            const int64_t w1 = w >= first ? w : 0, w2 = w >= second ? w : 0, w3 = w >= third ? w : 0;
            count1 += w1 != 0, count2 += w2 != 0, count3 += w3 != 0;
            sum1 += w1, sum2 += w2, sum3 += w3;
        }
        return {Amount{count1, sum1}, Amount{count2, sum2}, Amount{count3, sum3}};
    }

    // The tokens whose weight is in the range, in the order of their ids.
    void take(const int64_t* weights, int64_t size, Range& range) {
        const int64_t low = range.low, high = range.high;
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
        for (i = 0; i < num; ++i) weights_[static_cast<size_t>(i)] = weights[ids[i]];
        tighten(range);
    }

    // Drops what has been taken and is not in the range any more.
    void keep(Range& range) {
        int64_t num = 0;
        for (int64_t i = 0; i < size_; ++i) {
            const int64_t w = weights_[static_cast<size_t>(i)];
            weights_[static_cast<size_t>(num)] = w, ids_[static_cast<size_t>(num)] = ids_[static_cast<size_t>(i)];
            num += w >= range.low && w < range.high;
        }
        size_ = num;
        tighten(range);
    }

    // The range becomes that of the weights that were taken.
    void tighten(Range& range) const {
        int64_t low = range.high, high = range.low;
        for (int64_t i = 0; i < size_; ++i) low = std::min(low, weights_[static_cast<size_t>(i)]), high = std::max(high, weights_[static_cast<size_t>(i)]);
        range.low = low, range.high = high + 1;
        range.at_low.count = range.above.count + size_;
    }

    // The last of the best: of those that were taken, whose order is to be found.
    template <class Enough>
    Limit last_of_few(Amount a, const Enough& enough) {
        order_.resize(static_cast<size_t>(size_));
        std::iota(order_.begin(), order_.end(), size_t{0});
        const auto better = [&](size_t i, size_t j) { return weights_[i] > weights_[j] || (weights_[i] == weights_[j] && i < j); };
        std::sort(order_.begin(), order_.end(), better);
        Limit limit;
        for (const size_t i : order_) {
            ++a.count, a.sum += weights_[i];
            limit = {weights_[i], ids_[i], a.sum};
            if (enough(a)) break;
        }
        return limit;
    }

    // The same where the range has one weight alone.
    template <class Enough>
    static Limit last_of_equals(const int64_t* weights, int64_t size, const Range& range, const Enough& enough) {
        Limit limit;
        Amount a = range.above;
        for (int64_t i = 0; i < size; ++i) {
            if (weights[i] != range.low) continue;
            ++a.count, a.sum += range.low;
            limit = {range.low, i, a.sum};
            if (enough(a)) break;
        }
        return limit;
    }

    static constexpr Cuts FIRST = {FULL_WEIGHT >> 14, FULL_WEIGHT >> 9, FULL_WEIGHT >> 5};
    std::vector<int64_t> weights_;
    std::vector<int32_t> ids_;
    std::vector<size_t> order_;
    int64_t size_ = 0;
};
