// Sixteen float32 lanes with fused multiply-add. Only for files compiled with -mavx512f; internal linkage.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::avx512 {
namespace {

struct Simd {
    using Vector = __m512;
    static constexpr int kLanes = 16;
    // 24 accumulators of 32 registers
    static constexpr int kDotTokens = 4;
    static constexpr int kDotHidden = 6;
    static constexpr int kPanelRows = 8;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm512_setzero_ps(); }
    [[gnu::always_inline]] static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAllLanes, bits);
        return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, wide, 16));
    }
    [[gnu::always_inline]] static inline Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) {
        return _mm512_fmadd_ps(a, b, c);
    }
    [[gnu::always_inline]] static inline Vector absolute(Vector a) {
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
    }
    // bit i: NOT a[i] < b[i]
    [[gnu::always_inline]] static inline unsigned not_less(Vector a, Vector b) {
        return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
    }
    [[gnu::always_inline]] static inline float sum(Vector a) {
        const __m256 eight =
            _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, a, 0), _mm512_maskz_extractf32x8_ps(0xff, a, 1));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }

  private:
    // GCC 12 warns of uninitialised values inside the unmasked forms; with all lanes set these are the same instruction
    static constexpr __mmask16 kAllLanes = 0xffff;
};

}  // namespace
}  // namespace rep_fast::avx512
