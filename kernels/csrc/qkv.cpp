// From the QKV projection into the cache: split, norm of Q and K, rotation, and the write of K and V.
//
// T tokens; H query heads, K KV heads of D elements, of which the first 2 `half` turn; B blocks of S positions.
#include <cstring>
#include <vector>

#include "qkv.h"

namespace {

constexpr int64_t TOKENS_AT_ONCE = 16;  // neighbours write into the same cache lines

vf load_up_to(const float* p, int64_t n) { return n >= LANES ? load(p) : load_first(p, static_cast<int>(n)); }
void store_up_to(float* p, vf x, int64_t n) { n >= LANES ? store(p, x) : store_first(p, x, static_cast<int>(n)); }

// 1 / rms of `size` elements.
float norm_factor(const float* x, int64_t size, float eps) {
    vf squares = zero();
    for (int64_t i = 0; i < size; i += LANES) {
        const vf part = load_up_to(x + i, size - i);
        squares = fma(part, part, squares);
    }
    return 1.0f / std::sqrt(sum_lanes(squares) / static_cast<float>(size) + eps);
}

// One token's turn: what it does to a head.
struct Turn {
    const float *cos, *sin;
    int64_t half, head_size;

    // x, out: [D]; weight: [D], or null.
    void apply(const float* x, const float* weight, float factor, float* out) const {
        const auto normed = [=](int64_t i, int64_t n) {
            const vf part = load_up_to(x + i, n);
            return weight == nullptr ? part : mul(mul(part, set1(factor)), load_up_to(weight + i, n));
        };
        for (int64_t i = 0; i < half; i += LANES) {
            const int64_t n = half - i;
            const vf a = normed(i, n), b = normed(half + i, n), c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
            store_up_to(out + i, fma(a, c, mul(b, sub(zero(), s))), n);
            store_up_to(out + half + i, fma(b, c, mul(a, s)), n);
        }
        for (int64_t i = 2 * half; i < head_size; i += LANES) store_up_to(out + i, normed(i, head_size - i), head_size - i);
    }

    // x, out: [num_heads, D], normalised before where there is a weight.
    void apply_all(const float* x, int64_t num_heads, const float* weight, bool is_wide, float eps, float* out) const {
        float factor = is_wide ? norm_factor(x, num_heads * head_size, eps) : 1.0f;
        for (int64_t h = 0; h < num_heads; ++h, x += head_size, out += head_size) {
            if (weight != nullptr && !is_wide) factor = norm_factor(x, head_size, eps);
            apply(x, weight == nullptr || !is_wide ? weight : weight + h * head_size, factor, out);
        }
    }
};

// Writes one token's K and V, [K, D] each.
template <class T>
void write(const QKVArguments& a, int64_t slot, const float* k, const float* v, typename T::Item* row) {
    const int64_t block = slot / a.block_size, offset = slot % a.block_size, size = a.head_size;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
        const int64_t head = block * a.num_kv_heads + h, place = head * a.block_size + offset;
        const float k_scale = encode<T>(k + h * size, size, row);
        auto* column = static_cast<typename T::Item*>(a.k) + head * size * a.block_size + offset;
        for (int64_t d = 0; d < size; ++d) column[d * a.block_size] = row[d];
        const float v_scale = encode<T>(v + h * size, size, static_cast<typename T::Item*>(a.v) + place * size);
        if (a.k_scale != nullptr) a.k_scale[place] = k_scale, a.v_scale[place] = v_scale;
    }
}

}  // namespace

extern "C" EXPORT void penstock_qkv_rope_write(const QKVArguments* arguments) {
    const QKVArguments& a = *arguments;
    const int64_t q_size = a.num_heads * a.head_size, kv_size = a.num_kv_heads * a.head_size;
    with_type(a.type, [&]<class T>(T) {
        pool::parallel_for((a.num_tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, [&](int64_t item) {
            static thread_local std::vector<float> k;
            static thread_local std::vector<typename T::Item> row;
            k.resize(static_cast<size_t>(kv_size));
            row.resize(static_cast<size_t>(a.head_size));
            for (int64_t t = item * TOKENS_AT_ONCE; t < std::min(a.num_tokens, (item + 1) * TOKENS_AT_ONCE); ++t) {
                const Turn turn{a.cos + t * a.half, a.sin + t * a.half, a.half, a.head_size};
                const float* x = a.qkv + t * (q_size + 2 * kv_size);
                turn.apply_all(x, a.num_heads, a.q_norm, a.q_norm_is_wide, a.eps, a.q + t * q_size);
                turn.apply_all(x + q_size, a.num_kv_heads, a.k_norm, a.k_norm_is_wide, a.eps, k.data());
                write<T>(a, a.slots[t], k.data(), x + q_size + kv_size, row.data());
            }
        });
    });
}
