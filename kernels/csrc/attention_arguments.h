// What attention works on. T rows of the step; H query heads, K KV heads; D elements of a query, Dv of a value.
#pragma once

#include "kv_types.h"
#include "pool.h"

struct Options {
    float scale = 1;
    float softcap = 0;     // 0: none
    int64_t window = 0;    // 0: none
    const float* sinks = nullptr;  // [H]
};

// `Spans` of kernels/paged_kv.py.
struct Span {
    int32_t row_start, num_rows, start, table_offset;
};

struct Step {
    const float* q;  // [T, H, D]
    float* out;      // [T, H, Dv]
    const Span* spans;
    const int32_t* blocks;
    int64_t num_spans, num_heads, num_kv_heads, key_size, value_size;
};

// `Arguments` of kernels/native_attention.py.
struct AttentionArguments {
    Step step;
    Options options;
    const void *k, *v;
    const float *k_scale, *v_scale;
    int64_t block_size;
    KVType type;
};

extern "C" EXPORT void penstock_attention(const AttentionArguments* a);
