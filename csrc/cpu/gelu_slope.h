// Derivative of the exact GELU in vectors, and what the gradient of a gate needs of it.
#pragma once

#include "cpu/gated_adapter_gradient.h"
#include "cpu/gelu.h"
#include "cpu/panel_product.h"

namespace rep_fast {

// φ(x) = (2π)^−½ · 2^(−x²·log2(e)/2)
template <class V>
[[gnu::always_inline]] inline typename V::Vector normal_density(typename V::Vector x) {
    const typename V::Vector exponent = V::multiply(V::multiply(x, x), constant<V>(-0.72134752f));
    return V::multiply(constant<V>(0.39894228f), power_of_two<V>(exponent));
}

template <class V>
[[gnu::always_inline]] inline typename V::Vector load_up_to(const float* from, std::int64_t n) {
    return n >= V::kLanes ? V::load(from) : load_tail<V>(from, n > 0 ? n : 0);
}

template <class V>
[[gnu::always_inline]] inline void slope_panel(const SlopePanel& panel) {
    for (std::int64_t q = 0; q < kPanel; q += V::kLanes) {
        const typename V::Vector w2 = load_up_to<V>(panel.w2 + q, panel.n - q);
        typename V::Vector d_b1 = V::zero();
        typename V::Vector d_w2 = V::zero();
        for (std::int64_t t = 0; t < panel.n_tokens; ++t) {
            const typename V::Vector x = load_up_to<V>(panel.hidden + t * panel.hidden_stride + q, panel.n - q);
            const typename V::Vector d = V::broadcast(panel.d_logits + t);
            const typename V::Vector cdf = normal_cdf<V>(x);
            const typename V::Vector slope = V::multiply_add(x, normal_density<V>(x), cdf);
            const typename V::Vector d_hidden = V::multiply(V::multiply(d, w2), slope);
            V::store(panel.d_hidden + t * kPanel + q, d_hidden);
            d_b1 = V::add(d_b1, d_hidden);
            d_w2 = V::multiply_add(d, V::multiply(x, cdf), d_w2);
        }
        V::store(panel.d_b1 + q, d_b1);
        V::store(panel.d_w2 + q, d_w2);
    }
}

}  // namespace rep_fast
