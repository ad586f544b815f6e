// The operations that layers are made of, as Python and `layers.cpp` call them. Their files say what they take.
#pragma once

#include "attention_arguments.h"
#include "matmul.h"
#include "qkv.h"

extern "C" {

EXPORT void penstock_rms_norm(const float* x, const float* weight, int64_t num_weights, float eps, int64_t num_rows,
                              int64_t size, float* out);
EXPORT void penstock_linear(const Weights* w, const float* x, int64_t num_rows, const float* residual, float* out);
EXPORT void penstock_route(const float* logits, int64_t num_tokens, int32_t num_experts, int32_t top_k,
                           int32_t renormalize, int32_t is_sigmoid, const float* bias, int32_t num_groups,
                           int32_t top_groups, int32_t group_best, float scale, float* weights, int64_t* expert_ids);
EXPORT void penstock_experts(const Weights* const* gate_up, const Weights* const* down, int64_t num_experts, const float* x,
                             const float* weights, const int64_t* expert_ids, int64_t num_tokens, int64_t top_k,
                             const float* residual, float* out);

}
