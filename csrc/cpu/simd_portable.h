// Four float32 lanes by the compiler's vector extension: SSE2 on x86-64, no fused multiply-add.
// Everything has internal linkage, so each including file has its own copy.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::portable {
namespace {

struct Simd {
    // under-aligned: rows may start anywhere
    typedef float Vector __attribute__((vector_size(16), aligned(4)));
    static constexpr int kLanes = 4;
    // register tiles, see dot_block.h and panel_product.h: 8 accumulators of 16 registers
    static constexpr int kDotTokens = 4;
    static constexpr int kDotHidden = 2;
    static constexpr int kPanelRows = 4;
    static constexpr int kPanelVectors = 2;

    [[gnu::always_inline]] static inline Vector zero() { return Vector{}; }
    [[gnu::always_inline]] static inline Vector load(const float* from) {
        return *reinterpret_cast<const Vector*>(from);
    }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) {
        return Vector{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
    }
    [[gnu::always_inline]] static inline Vector broadcast(const float* from) {
        return Vector{*from, *from, *from, *from};
    }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return a + b; }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
    [[gnu::always_inline]] static inline Vector absolute(Vector a) { return a < 0.0f ? -a : a; }
    // bit i: NOT a[i] < b[i]
    [[gnu::always_inline]] static inline unsigned not_less(Vector a, Vector b) {
        unsigned bits = 0;
        for (int i = 0; i < kLanes; ++i) {
            bits |= a[i] < b[i] ? 0u : 1u << i;
        }
        return bits;
    }
    [[gnu::always_inline]] static inline float sum(Vector a) { return (a[0] + a[2]) + (a[1] + a[3]); }
};

}  // namespace
}  // namespace rep_fast::portable
