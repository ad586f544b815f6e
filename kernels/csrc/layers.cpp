// All layers of a step in one call: for few tokens, the way through Python between two operations would take longer than
// many of the operations do.
//
// T tokens of the step, C hidden size, E experts of which each token goes through k.
#include "ops.h"

namespace {

// Of `scratch`, beyond those of the operations.
enum Slot { NORMED = 8, Q, QKV, ATTENDED, INNER, BRANCH, GATE_LOGITS, GATE_WEIGHTS, EXPERT_IDS };

template <class T = float>
T* room(Slot slot, int64_t count) {
    return static_cast<T*>(scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}

// As Python fills them in; see kernels/layers.py.
struct Mixture {
    const Weights* router;
    const Weights *const *gate_up, *const *down;
    const float* score_bias;  // [E] or null
    int32_t num_experts, top_k, renormalize, is_sigmoid, num_groups, top_groups, group_best;
    float scale;
};

struct Layer {
    const float *attention_norm, *after_attention_norm, *mlp_norm, *after_mlp_norm;  // [C]; "after" may be null
    const Weights *qkv, *output;
    const QKVArguments* write;
    const AttentionArguments* attention;
    const Weights *gate_up, *down;  // null where there are experts alone
    const Mixture* mixture;         // or null; its result is added to that of the MLP
    int64_t rope;                   // which of the step's angles
};

struct Layers {
    const Layer* layers;
    int64_t num_layers, hidden_size;
    float eps;
};

struct Angles {
    const float *cos, *sin;  // [T, half]
    int64_t half;
};

// Rows of a step, ascending, and the spans that they make up by themselves.
struct Picked {
    const int64_t* rows;
    int64_t num_rows;
    const Span* spans;
    int64_t num_spans;
};

struct LayersStep {
    float* hidden;  // [T, C], overwritten by what the layers make of it
    int64_t num_tokens;
    const int64_t* slots;
    const Span* spans;
    const int32_t* blocks;
    int64_t num_spans;
    const Angles* angles;
    const Picked* picked;  // the rows whose results are asked for, which become the first; null: all
};

class Run {
  public:
    Run(const Layers& layers, const LayersStep& step)
        : all_(layers), step_(step), num_rows_(step.num_tokens), spans_(step.spans), num_spans_(step.num_spans) {}

    // Norm, Q, K and V; these into the cache, Q into its slot.
    void write(const Layer& layer) {
        float* qkv = linear(*layer.qkv, norm(step_.hidden, layer.attention_norm), room(QKV, num_rows_ * layer.qkv->n));
        const Angles& angles = step_.angles[layer.rope];
        QKVArguments a = *layer.write;
        a.qkv = qkv;
        a.q = room(Q, num_rows_ * a.num_heads * a.head_size);
        a.slots = step_.slots;
        a.cos = angles.cos, a.sin = angles.sin;
        a.num_tokens = num_rows_, a.half = angles.half;
        penstock_qkv_rope_write(&a);
    }

    // Hidden states and Q of the picked rows take the place of all.
    void pick(const Layer& layer) {
        const AttentionArguments& a = *layer.attention;
        const int64_t q_size = a.step.num_heads * a.step.key_size;
        float* q = room(Q, num_rows_ * q_size);
        for (int64_t i = 0; i < step_.picked->num_rows; ++i) {
            const int64_t row = step_.picked->rows[i];
            std::copy_n(q + row * q_size, q_size, q + i * q_size);
            std::copy_n(step_.hidden + row * all_.hidden_size, all_.hidden_size, step_.hidden + i * all_.hidden_size);
        }
        num_rows_ = step_.picked->num_rows;
        spans_ = step_.picked->spans, num_spans_ = step_.picked->num_spans;
    }

    // Attention and all that follows it.
    void rest(const Layer& layer) {
        if (num_rows_ == 0) return;
        add_branch(layer.after_attention_norm, [&](const float* residual, float* out) { attend(layer, residual, out); });
        const float* normed = norm(step_.hidden, layer.mlp_norm);
        add_branch(layer.after_mlp_norm, [&](const float* residual, float* out) {
            if (layer.gate_up) {
                const float* inner = linear(*layer.gate_up, normed, room(INNER, num_rows_ * layer.gate_up->n));
                penstock_linear(layer.down, inner, num_rows_, residual, out);
                residual = out;
            }
            if (layer.mixture) mix(*layer.mixture, normed, residual, out);
        });
    }

  private:
    // What a branch makes is added to the hidden states: while it is made, or after a norm of its own.
    template <class Branch>
    void add_branch(const float* after_norm, const Branch& branch) {
        if (after_norm == nullptr) return branch(step_.hidden, step_.hidden);
        float* made = room(BRANCH, num_rows_ * all_.hidden_size);
        branch(nullptr, made);
        const float* normed = norm(made, after_norm);
        pool::parallel_for(num_rows_, [&](int64_t row) {
            float* hidden = step_.hidden + row * all_.hidden_size;
            const float* x = normed + row * all_.hidden_size;
            for (int64_t i = 0; i < all_.hidden_size; ++i) hidden[i] += x[i];
        });
    }

    void attend(const Layer& layer, const float* residual, float* out) {
        AttentionArguments a = *layer.attention;
        a.step.q = room(Q, num_rows_ * a.step.num_heads * a.step.key_size);
        a.step.out = room(ATTENDED, num_rows_ * a.step.num_heads * a.step.value_size);
        a.step.spans = spans_, a.step.num_spans = num_spans_;
        a.step.blocks = step_.blocks;
        penstock_attention(&a);
        penstock_linear(layer.output, a.step.out, num_rows_, residual, out);
    }

    void mix(const Mixture& m, const float* x, const float* residual, float* out) {
        const float* logits = linear(*m.router, x, room(GATE_LOGITS, num_rows_ * m.num_experts));
        float* weights = room(GATE_WEIGHTS, num_rows_ * m.top_k);
        int64_t* ids = room<int64_t>(EXPERT_IDS, num_rows_ * m.top_k);
        penstock_route(logits, num_rows_, m.num_experts, m.top_k, m.renormalize, m.is_sigmoid, m.score_bias, m.num_groups,
                       m.top_groups, m.group_best, m.scale, weights, ids);
        penstock_experts(m.gate_up, m.down, m.num_experts, x, weights, ids, num_rows_, m.top_k, residual, out);
    }

    float* norm(const float* x, const float* weight) {
        float* out = room(NORMED, num_rows_ * all_.hidden_size);
        penstock_rms_norm(x, weight, 1, all_.eps, num_rows_, all_.hidden_size, out);
        return out;
    }

    float* linear(const Weights& w, const float* x, float* out) {
        penstock_linear(&w, x, num_rows_, nullptr, out);
        return out;
    }

    const Layers& all_;
    const LayersStep& step_;
    int64_t num_rows_;
    const Span* spans_;
    int64_t num_spans_;
};

}  // namespace

// Halves [first, last) of the layers: half 2 l is what layer l does until its K and V are in the cache, half 2 l + 1 the
// rest of it. Halves run in order on one thread, which keeps Q from one call to the next.
extern "C" EXPORT void penstock_run_layers(const Layers* layers, const LayersStep* step, int64_t first, int64_t last) {
    Run run(*layers, *step);
    for (int64_t half = first; half < last; ++half) {
        const Layer& layer = layers->layers[half / 2];
        if (half % 2 == 0) {
            run.write(layer);
        } else {
            if (step->picked && half / 2 == layers->num_layers - 1) run.pick(layer);
            run.rest(layer);
        }
    }
}
