// Gated activations, as `kernels/activation.py` defines them.
#pragma once

#include "matmul.h"

inline vf sigmoid_times(vf x, vf steepness_times_x) {
    return div(x, add(set1(1.0f), exp(sub(zero(), steepness_times_x))));
}

inline vf gate(Activation activation, vf g, vf u) {
    switch (activation) {
        case Activation::SILU: return mul(sigmoid_times(g, g), u);
        case Activation::GELU_TANH: {  // (1 + tanh z) / 2 is the sigmoid of 2 z
            const vf cubic = fma(mul(mul(g, g), g), set1(0.044715f), g);
            return mul(sigmoid_times(g, mul(set1(1.5957691216f), cubic)), u);
        }
        case Activation::SWIGLU_OAI: {
            const vf limit = set1(7.0f);
            g = min(g, limit);
            u = min(max(u, set1(-7.0f)), limit);
            return mul(sigmoid_times(g, mul(set1(1.702f), g)), add(u, set1(1.0f)));
        }
        case Activation::NONE: break;
    }
    return g;
}
