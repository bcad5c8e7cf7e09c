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
    typedef std::uint32_t Bits __attribute__((vector_size(16), aligned(4)));
    static constexpr int kLanes = 4;
    using Element = float;
    using Factor = Vector;
    static constexpr int kElements = kLanes;
    // register tiles, see dot_block.h and panel_product.h: 8 accumulators of 16 registers
    static constexpr int kDotTokens = 2;
    static constexpr int kDotHidden = 4;
    static constexpr int kPanelRows = 4;
    static constexpr int kPanelVectors = 2;

    [[gnu::always_inline]] static inline Vector zero() { return Vector{}; }
    [[gnu::always_inline]] static inline Vector load(const float* from) {
        return *reinterpret_cast<const Vector*>(from);
    }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) {
        return Vector{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
    }
    [[gnu::always_inline]] static inline Vector load(const Float16* from) {
        return Vector{to_float(from[0]), to_float(from[1]), to_float(from[2]), to_float(from[3])};
    }
    // The same vector, hidden from the compiler, which would load it again for each use.
    [[gnu::always_inline]] static inline Vector once(Vector value) {
        __asm__("" : "+x"(value));
        return value;
    }
    [[gnu::always_inline]] static inline Vector broadcast(const float* from) {
        return Vector{*from, *from, *from, *from};
    }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { *reinterpret_cast<Vector*>(to) = value; }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return a + b; }
    [[gnu::always_inline]] static inline Vector subtract(Vector a, Vector b) { return a - b; }
    [[gnu::always_inline]] static inline Vector multiply(Vector a, Vector b) { return a * b; }
    [[gnu::always_inline]] static inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
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
    // x < 0 ? a : b
    [[gnu::always_inline]] static inline Vector where_negative(Vector x, Vector a, Vector b) {
        return x < 0.0f ? a : b;
    }
    // value · 2ⁿ, where the low bits of `shifted` hold n
    [[gnu::always_inline]] static inline Vector add_exponent(Vector value, Vector shifted) {
        return reinterpret_cast<Vector>(reinterpret_cast<Bits>(value) + (reinterpret_cast<Bits>(shifted) << 23));
    }
    // to[h] (+)= the sum of vector h
    [[gnu::always_inline]] static inline void fold(const Vector (&sums)[kDotHidden], float* to, bool first) {
        for (int h = 0; h < kDotHidden; ++h) {
            to[h] = first ? sum(sums[h]) : to[h] + sum(sums[h]);
        }
    }
    [[gnu::always_inline]] static inline float sum(Vector a) { return (a[0] + a[2]) + (a[1] + a[3]); }
};

// The same in float64, half as many lanes.
struct Simd64 {
    typedef double Vector __attribute__((vector_size(16), aligned(8)));
    using Element = double;
    static constexpr int kLanes = 2;
    static constexpr int kPanelRows = 4;
    static constexpr int kPanelVectors = 2;

    [[gnu::always_inline]] static inline Vector zero() { return Vector{}; }
    [[gnu::always_inline]] static inline Vector load(const double* from) {
        return *reinterpret_cast<const Vector*>(from);
    }
    [[gnu::always_inline]] static inline Vector broadcast(const double* from) { return Vector{*from, *from}; }
    [[gnu::always_inline]] static inline void store(double* to, Vector value) {
        *reinterpret_cast<Vector*>(to) = value;
    }
    [[gnu::always_inline]] static inline Vector subtract(Vector a, Vector b) { return a - b; }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
};

}  // namespace
}  // namespace rep_fast::portable
