// What the step from the QKV projection into the cache works on: T tokens; H query heads, K KV heads of D elements, of
// which the first 2 `half` turn; B blocks of S positions.
#pragma once

#include "kv_types.h"
#include "pool.h"

// `Arguments` of kernels/qkv.py.
struct QKVArguments {
    const float* qkv;  // [T, (H + 2K) D]
    float* q;          // [T, H, D]
    const int64_t* slots;      // [T]
    const float *cos, *sin;    // [T, half]
    int64_t num_tokens, half;
    void *k, *v;                   // [B, K, D, S] and [B, K, S, D]
    float *k_scale, *v_scale;      // [B, K, S], or null
    const float *q_norm, *k_norm;  // null, or [D]; [H D] and [K D] where the norm is over all heads
    int64_t num_heads, num_kv_heads, head_size, block_size;
    int32_t q_norm_is_wide, k_norm_is_wide;
    float eps;
    KVType type;
};

extern "C" EXPORT void penstock_qkv_rope_write(const QKVArguments* arguments);
