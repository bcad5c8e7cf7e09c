// Exact (erf) GELU, x·Φ(x), in vectors, and a panel's share of a gate's logit.
//
// Φ(−a) = 2^−(1 + a·p(a)) for a ≥ 0, p a polynomial fitted on [0, 7] for the least absolute error of Φ, and
// Φ(a) = 1 − Φ(−a): |error| ≤ 3·2⁻²⁴·|x| with the rounding of the evaluation. Beyond 7 the exponent keeps growing, so
// GELU goes to 0 and to x. NaN and infinities give what is not finite.
#pragma once

#include <cstdint>

#include "cpu/dot_block.h"

namespace rep_fast {

constexpr float kGeluExponent[] = {2.1858342e-08f, -7.03924e-07f,  9.563577e-06f, -6.968568e-05f, 2.6053775e-04f,
                                   3.2787793e-05f, -6.980741e-03f, 5.246109e-02f, 4.5921513e-01f, 1.1511048f};
// 2^f on [−½, ½], relative error 2⁻²⁸.
constexpr float kPowerOfTwo[] = {1.5345811e-04f, 1.3399931e-03f, 9.618489e-03f, 5.5503286e-02f,
                                 2.4022646e-01f, 6.931472e-01f,  1.0f};

template <class V, int kTerms>
[[gnu::always_inline]] inline typename V::Vector polynomial(const float (&terms)[kTerms], typename V::Vector x) {
    typename V::Vector value = V::broadcast(terms);
    for (int i = 1; i < kTerms; ++i) {
        value = V::multiply_add(value, x, V::broadcast(terms + i));
    }
    return value;
}

template <class V>
[[gnu::always_inline]] inline typename V::Vector constant(float value) {
    return V::broadcast(&value);
}

// 2^y for y ≤ 0; below 2⁻¹²⁵ it stays there.
template <class V>
[[gnu::always_inline]] inline typename V::Vector power_of_two(typename V::Vector y) {
    const typename V::Vector clamped = V::maximum(y, constant<V>(-125.0f));
    const typename V::Vector magic = constant<V>(0x1.8p23f);  // adding it rounds to an integer, kept in the low bits
    const typename V::Vector shifted = V::add(clamped, magic);
    const typename V::Vector fraction = V::subtract(clamped, V::subtract(shifted, magic));
    return V::add_exponent(polynomial<V>(kPowerOfTwo, fraction), shifted);
}

// Φ(x) and, as well, Φ(−|x|).
template <class V>
[[gnu::always_inline]] inline typename V::Vector normal_cdf(typename V::Vector x) {
    const typename V::Vector a = V::absolute(x);
    const typename V::Vector one = constant<V>(1.0f);
    const typename V::Vector exponent = V::multiply_add(polynomial<V>(kGeluExponent, a), a, one);
    const typename V::Vector tail = power_of_two<V>(V::subtract(V::zero(), exponent));
    return V::where_negative(x, tail, V::subtract(one, tail));
}

template <class V>
[[gnu::always_inline]] inline typename V::Vector gelu(typename V::Vector x) {
    return V::multiply(x, normal_cdf<V>(x));
}

// Σ_h w2[h]·GELU(products[h] + b1[h]), n of them, in float32.
template <class V>
[[gnu::always_inline]] inline float gate_sum(const float* products, const float* b1, const float* w2, std::int64_t n) {
    typename V::Vector total = V::zero();
    std::int64_t h = 0;
    for (; h + V::kLanes <= n; h += V::kLanes) {
        const typename V::Vector hidden = V::add(V::load(products + h), V::load(b1 + h));
        total = V::multiply_add(gelu<V>(hidden), V::load(w2 + h), total);
    }
    if (h < n) {
        const typename V::Vector hidden = V::add(load_tail<V>(products + h, n - h), load_tail<V>(b1 + h, n - h));
        total = V::multiply_add(gelu<V>(hidden), load_tail<V>(w2 + h, n - h), total);
    }
    return V::sum(total);
}

}  // namespace rep_fast
