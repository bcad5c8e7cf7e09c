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
    using Element = float;
    using Factor = Vector;
    static constexpr int kElements = kLanes;
    // 24 accumulators, 3 keys and a weight of 32 registers; 11 loads stand against 24 multiply-adds
    static constexpr int kDotTokens = 3;
    static constexpr int kDotHidden = 8;
    static constexpr int kPanelRows = 8;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm512_setzero_ps(); }
    [[gnu::always_inline]] static inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
    [[gnu::always_inline]] static inline Vector load(const BFloat16* from) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
        const __m512i wide = _mm512_maskz_cvtepu16_epi32(kAllLanes, bits);
        return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAllLanes, wide, 16));
    }
    [[gnu::always_inline]] static inline Vector load(const Float16* from) {
        return _mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    // The same vector, hidden from the compiler, which would load it again for each use.
    [[gnu::always_inline]] static inline Vector once(Vector value) {
        __asm__("" : "+v"(value));
        return value;
    }
    [[gnu::always_inline]] static inline Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
    [[gnu::always_inline]] static inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
    [[gnu::always_inline]] static inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
    [[gnu::always_inline]] static inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
    [[gnu::always_inline]] static inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
    [[gnu::always_inline]] static inline Vector maximum(Vector a, Vector b) {
        return _mm512_maskz_max_ps(kAllLanes, a, b);
    }
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
    // x < 0 ? a : b
    [[gnu::always_inline]] static inline Vector where_negative(Vector x, Vector a, Vector b) {
        return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ), a);
    }
    // value · 2ⁿ, where the low bits of `shifted` hold n
    [[gnu::always_inline]] static inline Vector add_exponent(Vector value, Vector shifted) {
        const __m512i exponent = _mm512_maskz_slli_epi32(kAllLanes, _mm512_castps_si512(shifted), 23);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value), exponent));
    }
    // to[h] (+)= the sum of vector h: lanes are added in halves, as in `sum`, all vectors at once
    [[gnu::always_inline]] static inline void fold(const Vector (&sums)[kDotHidden], float* to, bool first) {
        const Vector ab = halves(sums[0], sums[1]);
        const Vector cd = halves(sums[2], sums[3]);
        const Vector ef = halves(sums[4], sums[5]);
        const Vector gh = halves(sums[6], sums[7]);
        const Vector a_to_d = quarters(ab, cd);
        const Vector e_to_h = quarters(ef, gh);
        const Vector pairs = _mm512_add_ps(_mm512_maskz_shuffle_ps(kAllLanes, a_to_d, e_to_h, 0x44),
                                           _mm512_maskz_shuffle_ps(kAllLanes, a_to_d, e_to_h, 0xee));
        const Vector totals = _mm512_add_ps(pairs, _mm512_maskz_permute_ps(kAllLanes, pairs, 0xb1));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        const __m256 row = _mm512_maskz_extractf32x8_ps(0xff, _mm512_maskz_permutexvar_ps(kAllLanes, order, totals), 0);
        _mm256_storeu_ps(to, first ? row : _mm256_add_ps(_mm256_loadu_ps(to), row));
    }
    [[gnu::always_inline]] static inline float sum(Vector a) {
        const __m256 eight =
            _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, a, 0), _mm512_maskz_extractf32x8_ps(0xff, a, 1));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
    }

  private:
    // sums of the halves of a, then of b
    [[gnu::always_inline]] static inline Vector halves(Vector a, Vector b) {
        return _mm512_add_ps(_mm512_mask_blend_ps(0xff00, a, b), _mm512_maskz_shuffle_f32x4(kAllLanes, a, b, 0x4e));
    }
    [[gnu::always_inline]] static inline Vector quarters(Vector ab, Vector cd) {
        return _mm512_add_ps(_mm512_maskz_shuffle_f32x4(kAllLanes, ab, cd, 0x88),
                             _mm512_maskz_shuffle_f32x4(kAllLanes, ab, cd, 0xdd));
    }
    // GCC 12 warns of uninitialised values inside the unmasked forms; with all lanes set these are the same instruction
    static constexpr __mmask16 kAllLanes = 0xffff;
};

// The same in float64, half as many lanes.
struct Simd64 {
    using Vector = __m512d;
    using Element = double;
    static constexpr int kLanes = 8;
    static constexpr int kPanelRows = 8;
    static constexpr int kPanelVectors = 3;

    [[gnu::always_inline]] static inline Vector zero() { return _mm512_setzero_pd(); }
    [[gnu::always_inline]] static inline Vector load(const double* from) { return _mm512_loadu_pd(from); }
    [[gnu::always_inline]] static inline Vector widen(const float* from) {
        return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));  // masked for the reason given in Simd
    }
    [[gnu::always_inline]] static inline Vector broadcast(const double* from) { return _mm512_set1_pd(*from); }
    [[gnu::always_inline]] static inline void store(double* to, Vector value) { _mm512_storeu_pd(to, value); }
    [[gnu::always_inline]] static inline Vector subtract(Vector a, Vector b) { return _mm512_sub_pd(a, b); }
    [[gnu::always_inline]] static inline Vector multiply_add(Vector a, Vector b, Vector c) {
        return _mm512_fmadd_pd(a, b, c);
    }
};

}  // namespace
}  // namespace rep_fast::avx512
