// The loop of every product ceiling: independent sums, one instruction each per round. Everything has internal linkage,
// so each including file has its own copy.
#pragma once

#include <cstdint>

#include "cpu/ceilings.h"

namespace rep_fast {
namespace {

// Step: Sum, start(i), the instruction as step(sum), add(a, b) and first(sum), a number of its first lane.
template <class Step>
float run_ceiling(std::int64_t rounds) {
    typename Step::Sum sums[kCeilingSums];
    for (int i = 0; i < kCeilingSums; ++i) {
        sums[i] = Step::start(i);
    }
    const Step step;
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kCeilingSums; ++i) {
            sums[i] = step(sums[i]);
        }
    }
    typename Step::Sum total = sums[0];
    for (int i = 1; i < kCeilingSums; ++i) {
        total = Step::add(total, sums[i]);
    }
    return Step::first(total);
}

// x ← 0.999x + 0.001 in every lane.
template <class Simd>
struct MultiplyAdd {
    using Sum = typename Simd::Vector;

    [[gnu::always_inline]] static inline Sum start(int i) { return broadcast(static_cast<float>(i)); }
    [[gnu::always_inline]] inline Sum operator()(Sum sum) const { return Simd::multiply_add(sum, factor, term); }
    [[gnu::always_inline]] static inline Sum add(Sum a, Sum b) { return Simd::add(a, b); }
    [[gnu::always_inline]] static inline float first(Sum sum) {
        float lanes[Simd::kLanes];
        Simd::store(lanes, sum);
        return lanes[0];
    }
    [[gnu::always_inline]] static inline Sum broadcast(float value) { return Simd::broadcast(&value); }

    Sum factor = broadcast(0.999f);
    Sum term = broadcast(1e-3f);
};

template <class Simd>
constexpr CeilingLoop kMultiplyAdd = {run_ceiling<MultiplyAdd<Simd>>, kCeilingSums * Simd::kLanes * 2};

}  // namespace
}  // namespace rep_fast
