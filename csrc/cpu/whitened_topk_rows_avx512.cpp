// AVX-512 bodies of what whitened_topk does with one row: widening it to float32, and the float64 score of a pair.
//
// exact_score: the 16 lanes of the fixed order are two registers of doubles, added to in one step each; products of two
// float32 are exact in float64, so that a fused multiply-add is the sum and nothing else.
// Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::avx512 {
namespace {

constexpr std::int64_t kHalf = 8;
static_assert(kExactLanes == 2 * kHalf, "the exact score keeps 2 vectors of 8 lanes");

// 8 elements as float32; with a mask, zeros in place of the others, which are not read.
[[gnu::always_inline]] inline __m256 load8(const float* row) {
    return _mm256_loadu_ps(row);
}
[[gnu::always_inline]] inline __m256 load8(const BFloat16* row) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
[[gnu::always_inline]] inline __m256 load8(const Float16* row) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
}
[[gnu::always_inline]] inline __m256 load8(const float* row, __mmask8 there) {
    return _mm256_maskz_loadu_ps(there, row);
}
[[gnu::always_inline]] inline __m256 load8(const BFloat16* row, __mmask8 there) {
    const __m128i bits = _mm_maskz_loadu_epi16(there, row);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
[[gnu::always_inline]] inline __m256 load8(const Float16* row, __mmask8 there) {
    return _mm256_cvtph_ps(_mm_maskz_loadu_epi16(there, row));
}

[[gnu::always_inline]] inline __m512d as_doubles(__m256 eight) {
    return _mm512_maskz_cvtps_pd(0xff, eight);
}

[[gnu::always_inline]] inline __mmask8 first_lanes(std::int64_t n) {
    return n >= kHalf ? __mmask8{0xff} : n <= 0 ? __mmask8{0} : static_cast<__mmask8>((1u << n) - 1u);
}

template <class T>
double widen(const T* keys, std::int64_t n, float* widened) {
    __m512d sums[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    std::int64_t j = 0;
    for (; j + 4 * kHalf <= n; j += 4 * kHalf) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const __m256 eight = load8(keys + j + part * kHalf);
            _mm256_storeu_ps(widened + j + part * kHalf, eight);
            sums[part] = _mm512_fmadd_pd(as_doubles(eight), as_doubles(eight), sums[part]);
        }
    }
    for (; j < n; j += kHalf) {
        const __mmask8 there = first_lanes(n - j);
        const __m256 eight = load8(keys + j, there);
        _mm256_mask_storeu_ps(widened + j, there, eight);
        sums[0] = _mm512_fmadd_pd(as_doubles(eight), as_doubles(eight), sums[0]);
    }
    alignas(64) double lanes[kHalf];
    _mm512_store_pd(lanes, _mm512_add_pd(_mm512_add_pd(sums[0], sums[1]), _mm512_add_pd(sums[2], sums[3])));
    double square = 0.0;
    for (const double lane : lanes) {
        square += lane;
    }
    return square;
}

template <class T>
double exact_score(const T* key, const float* query, std::int64_t n, const T* next) {
    __m512d low = _mm512_setzero_pd();
    __m512d high = _mm512_setzero_pd();
    std::int64_t j = 0;
    for (; j + kExactLanes <= n; j += kExactLanes) {
        __builtin_prefetch(next + j, 0, 2);
        low = _mm512_fmadd_pd(as_doubles(load8(key + j)), as_doubles(load8(query + j)), low);
        high = _mm512_fmadd_pd(as_doubles(load8(key + j + kHalf)), as_doubles(load8(query + j + kHalf)), high);
    }
    // lanes beyond n add 0 · 0 and keep their bits: a sum that began at +0 is never −0
    const __mmask8 first = first_lanes(n - j);
    const __mmask8 second = first_lanes(n - j - kHalf);
    low = _mm512_fmadd_pd(as_doubles(load8(key + j, first)), as_doubles(load8(query + j, first)), low);
    high =
        _mm512_fmadd_pd(as_doubles(load8(key + j + kHalf, second)), as_doubles(load8(query + j + kHalf, second)), high);
    alignas(64) double lanes[kHalf];
    _mm512_store_pd(lanes, _mm512_add_pd(low, high));  // the first fold
    for (std::int64_t half = kHalf / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}

}  // namespace

constinit const ForKeyTypes<RowKernels> kRows = {.f32 = {widen<float>, exact_score<float>},
                                                 .bf16 = {widen<BFloat16>, exact_score<BFloat16>},
                                                 .f16 = {widen<Float16>, exact_score<Float16>}};

}  // namespace rep_fast::avx512
