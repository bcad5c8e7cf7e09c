// Dot products of a block of keys with a block of weight rows, both row-major as they come: nothing is repacked.
//
// V is a Simd struct of internal linkage, so every instantiation has internal linkage too. Lane i of a sum takes the
// products k ≡ i (mod kLanes) in ascending order and the lanes are folded once, at the end of the row: the bits depend
// neither on how many tokens or rows are multiplied together nor on the blocks of depth.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast {

inline constexpr std::int64_t kMaxLanes = 16;

// Part of products[t, h] = Σ_k keys[t, k] · weights[h, k], one block of depth. Unfinished sums rest in `lanes`
// [n_tokens, n_hidden, kMaxLanes] between blocks; `lanes` is not touched when a block is both first and last.
template <class W>
struct DotBlock {
    const float* keys;
    std::int64_t key_stride;
    std::int64_t n_tokens;
    const W* weights;
    std::int64_t weight_stride;
    std::int64_t n_hidden;
    std::int64_t depth;  // a multiple of kMaxLanes unless `last`
    float* lanes;
    float* products;
    std::int64_t product_stride;
    bool first;
    bool last;
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
    float* const lanes = block.lanes + (t0 * block.n_hidden + h0) * kMaxLanes;
    typename V::Vector sums[kTokens][kHidden];
    for (int t = 0; t < kTokens; ++t) {
        for (int h = 0; h < kHidden; ++h) {
            sums[t][h] = block.first ? V::zero() : V::load(lanes + (t * block.n_hidden + h) * kMaxLanes);
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
            if (block.last) {
                block.products[(t0 + t) * block.product_stride + h0 + h] = V::sum(sums[t][h]);
            } else {
                V::store(lanes + (t * block.n_hidden + h) * kMaxLanes, sums[t][h]);
            }
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
