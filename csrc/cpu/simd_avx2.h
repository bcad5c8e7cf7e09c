// Eight float32 lanes with fused multiply-add. Only for files compiled with -mavx2 -mfma; internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::avx2 {
namespace {

struct Simd {
    using Vector = __m256;
    static constexpr int kLanes = 8;
    using Element = float;
    using Factor = Vector;
    static constexpr int kElements = kLanes;
    // 12 accumulators, 3 keys and a weight fill the 16 registers; 7 loads stand against 12 multiply-adds
    static constexpr int kDotTokens = 3;
    static constexpr int kDotHidden = 4;
    static constexpr int kPanelRows = 4;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm256_setzero_ps(); }
    [[gnu::always_inline]] static inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    [[gnu::always_inline]] static inline Vector load(const Float16* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    // The same vector, hidden from the compiler, which would load it again for each use.
    [[gnu::always_inline]] static inline Vector once(Vector value) {
        __asm__("" : "+x"(value));
        return value;
    }
    [[gnu::always_inline]] static inline Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
    [[gnu::always_inline]] static inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
    [[gnu::always_inline]] static inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
    [[gnu::always_inline]] static inline Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) {
        return _mm256_fmadd_ps(a, b, c);
    }
    [[gnu::always_inline]] static inline Vector absolute(Vector a) {
        return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
    }
    // bit i: NOT a[i] < b[i]
    [[gnu::always_inline]] static inline unsigned not_less(Vector a, Vector b) {
        return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
    }
    // x < 0 ? a : b
    [[gnu::always_inline]] static inline Vector where_negative(Vector x, Vector a, Vector b) {
        return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_LT_OQ));
    }
    // value · 2ⁿ, where the low bits of `shifted` hold n
    [[gnu::always_inline]] static inline Vector add_exponent(Vector value, Vector shifted) {
        const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
        return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value), exponent));
    }
    // to[h] (+)= the sum of vector h: neighbours first, then their neighbours, then the halves
    [[gnu::always_inline]] static inline void fold(const Vector (&sums)[kDotHidden], float* to, bool first) {
        const Vector pairs = _mm256_hadd_ps(_mm256_hadd_ps(sums[0], sums[1]), _mm256_hadd_ps(sums[2], sums[3]));
        const __m128 row = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
        _mm_storeu_ps(to, first ? row : _mm_add_ps(_mm_loadu_ps(to), row));
    }
    [[gnu::always_inline]] static inline float sum(Vector a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
};

// The same in float64, half as many lanes.
struct Simd64 {
    using Vector = __m256d;
    using Element = double;
    static constexpr int kLanes = 4;
    static constexpr int kPanelRows = 4;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm256_setzero_pd(); }
    [[gnu::always_inline]] static inline Vector load(const double* from) { return _mm256_loadu_pd(from); }
    [[gnu::always_inline]] static inline Vector widen(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
    [[gnu::always_inline]] static inline Vector broadcast(const double* from) { return _mm256_broadcast_sd(from); }
    [[gnu::always_inline]] static inline void store(double* to, Vector value) { _mm256_storeu_pd(to, value); }
    [[gnu::always_inline]] static inline Vector subtract(Vector a, Vector b) { return _mm256_sub_pd(a, b); }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) {
        return _mm256_fmadd_pd(a, b, c);
    }
};

}  // namespace
}  // namespace rep_fast::avx2
