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
    // 12 accumulators + 3 + 1 fill the 16 registers; 7 loads stand against 12 multiply-adds
    static constexpr int kDotTokens = 4;
    static constexpr int kDotHidden = 3;
    static constexpr int kPanelRows = 4;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm256_setzero_ps(); }
    [[gnu::always_inline]] static inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
    }
    [[gnu::always_inline]] static inline Vector broadcast(const float* from) { return _mm256_broadcast_ss(from); }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
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
    [[gnu::always_inline]] static inline float sum(Vector a) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }
};

}  // namespace
}  // namespace rep_fast::avx2
