// Which scores of a float32 pass stay in play, for every vector type. Everything has internal linkage, so each
// including file has its own copy.
#pragma once

#include <cstdint>

namespace rep_fast {
namespace {

// Float32Products::select; Simd has not_less, the lanes of a for which NOT a < b as bits.
template <class Simd>
std::int64_t select_scores(const float* scores, const float* margins, const float* thresholds, float key_norm,
                           float underflow, std::int64_t n, float* bounds, std::int32_t* survivors) {
    using Vector = typename Simd::Vector;
    const Vector norm = Simd::broadcast(&key_norm);
    const Vector rest = Simd::broadcast(&underflow);
    std::int64_t count = 0;
    for (std::int64_t q = 0; q < n; q += Simd::kLanes) {
        const Vector margin = Simd::multiply_add(norm, Simd::load(margins + q), rest);
        const Vector bound = Simd::add(Simd::load(scores + q), margin);
        Simd::store(bounds + q, bound);
        for (unsigned alive = Simd::not_less(bound, Simd::load(thresholds + q)); alive != 0; alive &= alive - 1) {
            survivors[count++] = static_cast<std::int32_t>(q) + __builtin_ctz(alive);
        }
    }
    return count;
}

}  // namespace
}  // namespace rep_fast
