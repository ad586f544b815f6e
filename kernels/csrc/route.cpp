// The gate of a mixture of experts, as `kernels/moe.py` defines it. Each token is computed alone and in one order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops.h"

namespace {

struct Routing {
    int32_t num_experts, top_k, renormalize, is_sigmoid;
    int32_t num_groups, top_groups, group_best;
    float scale;
    const float* bias;  // [E] or null
};

constexpr int64_t TOKENS_AT_ONCE = 32;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

struct Gate {
    const Routing& routing;
    std::vector<float> scores, ranks, groups;

    explicit Gate(const Routing& r)
        : routing(r), scores(static_cast<size_t>(r.num_experts) + LANES), ranks(scores.size()), groups(static_cast<size_t>(r.num_groups)) {}

    void run(const float* logits, float* weights, int64_t* expert_ids) {
        score(logits);
        const int32_t num_experts = routing.num_experts;
        // Without a bias the order of the logits is that of the scores, and knows no ties of rounding.
        const bool by_logits = !routing.is_sigmoid && !routing.bias && routing.num_groups == 1;
        for (int32_t e = 0; e < num_experts; ++e)
            ranks[size_t(e)] = by_logits ? logits[e] : scores[size_t(e)] + (routing.bias ? routing.bias[e] : 0.0f);
        if (routing.top_groups < routing.num_groups) keep_best_groups();
        float total = 0;
        for (int32_t choice = 0; choice < routing.top_k; ++choice) {
            const int32_t best = take_best(ranks.data(), num_experts);
            expert_ids[choice] = best;
            weights[choice] = scores[size_t(best)];
            total += weights[choice];
        }
        for (int32_t choice = 0; choice < routing.top_k; ++choice)
            weights[choice] = (routing.renormalize ? weights[choice] / (total + 1e-20f) : weights[choice]) * routing.scale;
    }

  private:
    // scores = softmax or sigmoid of the logits.
    void score(const float* logits) {
        const int64_t num_experts = routing.num_experts;
        const float shift = routing.is_sigmoid ? 0.0f : *std::max_element(logits, logits + num_experts);
        float total = 0;
        for (int64_t e = 0; e < num_experts; e += LANES) {
            const int n = static_cast<int>(std::min<int64_t>(LANES, num_experts - e));
            const vf x = sub(load_first(logits + e, n), set1(shift));
            const vf y = routing.is_sigmoid ? div(set1(1.0f), add(set1(1.0f), exp(sub(zero(), x)))) : exp(x);
            store(scores.data() + e, y);
            if (!routing.is_sigmoid)
                for (int64_t i = e; i < e + n; ++i) total += scores[size_t(i)];
        }
        if (!routing.is_sigmoid)
            for (int64_t e = 0; e < num_experts; ++e) scores[size_t(e)] /= total;
    }

    // The first of the largest; it can't be taken again.
    static int32_t take_best(float* values, int32_t count) {
        const int32_t best = static_cast<int32_t>(std::max_element(values, values + count) - values);
        values[best] = NEVER;
        return best;
    }

    void keep_best_groups() {
        const int32_t size = routing.num_experts / routing.num_groups;
        std::vector<float> members(static_cast<size_t>(size));
        for (int32_t g = 0; g < routing.num_groups; ++g) {
            std::copy_n(ranks.data() + g * size, size, members.data());
            groups[size_t(g)] = 0;
            for (int32_t i = 0; i < routing.group_best; ++i) {
                const int32_t best = take_best(members.data(), size);
                groups[size_t(g)] += ranks[size_t(g * size + best)];
            }
        }
        std::vector<bool> kept(static_cast<size_t>(routing.num_groups));
        for (int32_t i = 0; i < routing.top_groups; ++i) kept[size_t(take_best(groups.data(), routing.num_groups))] = true;
        for (int32_t e = 0; e < routing.num_experts; ++e)
            if (!kept[size_t(e / size)]) ranks[size_t(e)] = NEVER;
    }
};

}  // namespace

// logits: [T, E]; weights: [T, k]; expert_ids: [T, k].
extern "C" EXPORT void penstock_route(const float* logits, int64_t num_tokens, int32_t num_experts, int32_t top_k,
                                      int32_t renormalize, int32_t is_sigmoid, const float* bias, int32_t num_groups,
                                      int32_t top_groups, int32_t group_best, float scale, float* weights, int64_t* expert_ids) {
    const Routing routing{num_experts, top_k, renormalize, is_sigmoid, num_groups, top_groups, group_best, scale, bias};
    pool::parallel_for((num_tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, [&](int64_t item) {
        Gate gate(routing);
        for (int64_t t = item * TOKENS_AT_ONCE; t < std::min(num_tokens, (item + 1) * TOKENS_AT_ONCE); ++t)
            gate.run(logits + t * num_experts, weights + t * top_k, expert_ids + t * top_k);
    });
}
