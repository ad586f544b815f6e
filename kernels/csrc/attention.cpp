// Attention over the K and V of each head, or over latents, in every type that the cache may have.
#include "attention.h"

extern "C" {

EXPORT void penstock_attention(const AttentionArguments* a) {
    with_type(a->type, [a]<class T>(T) {
        using Item = typename T::Item;
        const HeadSource<T> source{static_cast<const Item*>(a->k), static_cast<const Item*>(a->v), a->k_scale, a->v_scale,
                                   a->step.num_kv_heads, a->block_size, a->step.key_size, a->step.value_size};
        attention::run(source, a->step, a->options);
    });
}

// `k` holds latents [B, S, D], whose first Dv elements are the values. One KV head; `v` and the scales are null.
EXPORT void penstock_latent_attention(const AttentionArguments* a) {
    with_type(a->type, [a]<class T>(T) {
        const LatentSource<T> source{static_cast<const typename T::Item*>(a->k), a->block_size, a->step.key_size, a->step.value_size};
        attention::run(source, a->step, a->options);
    });
}

}
