// Dot products of a block of keys with a block of weight rows, both row-major as they come: nothing is repacked.
//
// V is a Simd struct of internal linkage, so every instantiation has internal linkage too. Lane i of a sum takes the
// products k ≡ i (mod kLanes) in ascending order, whatever the tile: the bits do not depend on how many tokens or rows
// are multiplied together.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast {

// sums[t, h] (+)= Σ_{k < depth} keys[t, k] · weights[h, k]; `first` overwrites instead of adding.
template <class W>
struct DotBlock {
    const float* keys;
    std::int64_t key_stride;
    std::int64_t n_tokens;
    const W* weights;
    std::int64_t weight_stride;
    std::int64_t n_hidden;
    std::int64_t depth;
    float* sums;
    std::int64_t sum_stride;
    bool first;
};

// The last depth % kLanes elements, zeros after them.
template <class V, class T>
[[gnu::always_inline]] inline typename V::Vector load_tail(const T* from, std::int64_t n) {
    float lanes[V::kLanes] = {};
    for (std::int64_t i = 0; i < n; ++i) {
        lanes[i] = to_float(from[i]);
    }
    return V::load(lanes);
}

template <class V, int kTokens, int kHidden, class W>
[[gnu::always_inline]] inline void dot_tile(const DotBlock<W>& block, std::int64_t t0, std::int64_t h0) {
    const float* const keys = block.keys + t0 * block.key_stride;
    const W* const weights = block.weights + h0 * block.weight_stride;
    typename V::Vector sums[kTokens][kHidden];
    for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < kHidden; ++h) {
            sums[t][h] = V::zero();
        }
    }
    std::int64_t k = 0;
    for (; k + V::kLanes <= block.depth; k += V::kLanes) {
        typename V::Vector weight[kHidden];
        for (int h = 0; h < kHidden; ++h) {
            weight[h] = V::load(weights + h * block.weight_stride + k);
        }
        for (int t = 0; t < kTokens; ++t) {
            const typename V::Vector key = V::load(keys + t * block.key_stride + k);
            for (int h = 0; h < kHidden; ++h) {
                sums[t][h] = V::multiply_add(key, weight[h], sums[t][h]);
            }
        }
    }
    const std::int64_t rest = block.depth - k;
    for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < kHidden; ++h) {
            if (rest > 0) {
                sums[t][h] = V::multiply_add(load_tail<V>(keys + t * block.key_stride + k, rest),
                                             load_tail<V>(weights + h * block.weight_stride + k, rest), sums[t][h]);
            }
            float* const sum = block.sums + (t0 + t) * block.sum_stride + h0 + h;
            *sum = block.first ? V::sum(sums[t][h]) : *sum + V::sum(sums[t][h]);
        }
    }
}

// All tokens with kHidden weight rows, which stay in the first-level cache meanwhile.
template <class V, int kHidden, class W>
[[gnu::always_inline]] inline void dot_strip(const DotBlock<W>& block, std::int64_t h0) {
    std::int64_t t = 0;
    for (; t + V::kDotTokens <= block.n_tokens; t += V::kDotTokens) {
        dot_tile<V, V::kDotTokens, kHidden>(block, t, h0);
    }
    for (; t + 2 <= block.n_tokens; t += 2) {
        dot_tile<V, 2, kHidden>(block, t, h0);
    }
    for (; t < block.n_tokens; ++t) {
        dot_tile<V, 1, kHidden>(block, t, h0);
    }
}

template <class V, class W>
[[gnu::always_inline]] inline void dot_block(const DotBlock<W>& block) {
    std::int64_t h = 0;
    if (block.n_tokens == 1) {  // memory-bound: eight rows at once keep enough reads in flight
        for (; h + 8 <= block.n_hidden; h += 8) {
            dot_tile<V, 1, 8>(block, 0, h);
        }
    }
    for (; h + V::kDotHidden <= block.n_hidden; h += V::kDotHidden) {
        dot_strip<V, V::kDotHidden>(block, h);
    }
    for (; h < block.n_hidden; ++h) {
        dot_strip<V, 1>(block, h);
    }
}

}  // namespace rep_fast
