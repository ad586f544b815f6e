// Attention over the K and V of each head, in every type that the cache may have.
#include "attention.h"

namespace {

enum class Type : int32_t { F32, BF16, F16, I8 };

}  // namespace

extern "C" {

// `Arguments` of kernels/native_attention.py.
struct AttentionArguments {
    Step step;
    Options options;
    const void *k, *v;
    const float *k_scale, *v_scale;
    int64_t block_size;
    Type type;
};

EXPORT void penstock_attention(const AttentionArguments* a) {
    const auto run = [a]<class T>(T) {
        using Item = typename T::Item;
        const HeadSource<T> source{static_cast<const Item*>(a->k), static_cast<const Item*>(a->v), a->k_scale, a->v_scale,
                                   a->step.num_kv_heads, a->block_size, a->step.key_size, a->step.value_size};
        attention::run(source, a->step, a->options);
    };
    switch (a->type) {
        case Type::F32: return run(F32{});
        case Type::BF16: return run(BF16{});
        case Type::F16: return run(F16{});
        case Type::I8: return run(I8{});
    }
}

// The same over latents [B, S, D], whose first Dv elements are the values. One KV head; `v` and the scales are null.
EXPORT void penstock_latent_attention(const AttentionArguments* a) {
    const auto run = [a]<class T>(T) {
        const LatentSource<T> source{static_cast<const typename T::Item*>(a->k), a->block_size, a->step.key_size, a->step.value_size};
        attention::run(source, a->step, a->options);
    };
    switch (a->type) {
        case Type::F32: return run(F32{});
        case Type::BF16: return run(BF16{});
        case Type::F16: return run(F16{});
        case Type::I8: return;  // no latent is cached so
    }
}

}
