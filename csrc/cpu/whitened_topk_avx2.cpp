// AVX2 + FMA + F16C bodies of whitened_topk.
//
// multiply: register tile of 6 keys × 16 queries: 12 accumulators, 2 loads of queries and 1 broadcast fill 15 of the 16
// vector registers, and per k-step 12 FMA stand against 2 loads + 6 broadcasts, so both FMA ports stay busy.
// Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/score_selection.h"
#include "cpu/simd_avx2.h"
#include "cpu/whitened_topk_kernels.h"

namespace rep_fast::avx2 {
namespace {

static_assert(kPanelQueries == 16 && kTileKeys == 6, "the register tile is written for 6 keys and 2 vectors of 8");
static_assert(kExactLanes == 16, "the exact score keeps 4 vectors of 4 lanes");

// 8 keys as float32.
[[gnu::always_inline]] inline __m256 load8(const float* keys) {
    return _mm256_loadu_ps(keys);
}
[[gnu::always_inline]] inline __m256 load8(const BFloat16* keys) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keys));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
[[gnu::always_inline]] inline __m256 load8(const Float16* keys) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys)));
}

[[gnu::always_inline]] inline __m256d low4(__m256 eight) {
    return _mm256_cvtps_pd(_mm256_castps256_ps128(eight));
}
[[gnu::always_inline]] inline __m256d high4(__m256 eight) {
    return _mm256_cvtps_pd(_mm256_extractf128_ps(eight, 1));
}

template <class T>
double widen(const T* keys, std::int64_t n, float* widened) {
    __m256d low = _mm256_setzero_pd();
    __m256d high = _mm256_setzero_pd();
    std::int64_t j = 0;
    for (; j + 8 <= n; j += 8) {
        const __m256 eight = load8(keys + j);
        _mm256_storeu_ps(widened + j, eight);
        low = _mm256_fmadd_pd(low4(eight), low4(eight), low);
        high = _mm256_fmadd_pd(high4(eight), high4(eight), high);
    }
    alignas(32) double lanes[4];
    _mm256_store_pd(lanes, _mm256_add_pd(low, high));
    double square = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (; j < n; ++j) {
        widened[j] = to_float(keys[j]);
        square += static_cast<double>(widened[j]) * static_cast<double>(widened[j]);
    }
    return square;
}

template <class T>
double exact_score(const T* key, const float* query, std::int64_t n, const T* next) {
    __m256d sums[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd()};
    std::int64_t j = 0;
    for (; j + kExactLanes <= n; j += kExactLanes) {
        __builtin_prefetch(next + j, 0, 2);
        const __m256 key_low = load8(key + j);
        const __m256 key_high = load8(key + j + 8);
        const __m256 query_low = _mm256_loadu_ps(query + j);
        const __m256 query_high = _mm256_loadu_ps(query + j + 8);
        sums[0] = _mm256_fmadd_pd(low4(key_low), low4(query_low), sums[0]);
        sums[1] = _mm256_fmadd_pd(high4(key_low), high4(query_low), sums[1]);
        sums[2] = _mm256_fmadd_pd(low4(key_high), low4(query_high), sums[2]);
        sums[3] = _mm256_fmadd_pd(high4(key_high), high4(query_high), sums[3]);
    }
    alignas(32) double lanes[kExactLanes];
    for (int part = 0; part < 4; ++part) {
        _mm256_store_pd(lanes + 4 * part, sums[part]);
    }
    for (std::int64_t lane = 0; j < n; ++j, ++lane) {
        lanes[lane] += static_cast<double>(to_float(key[j])) * static_cast<double>(query[j]);
    }
    for (std::int64_t half = kExactLanes / 2; half > 0; half /= 2) {
        for (std::int64_t lane = 0; lane < half; ++lane) {
            lanes[lane] += lanes[lane + half];
        }
    }
    return lanes[0];
}

// One tile: scores[6, 16] (+)= keys[6, depth] · panel[depth, 16].
void multiply_tile(const float* keys, const float* panel, std::int64_t depth, float* scores, std::int64_t score_stride,
                   bool first) {
    __m256 sums[kTileKeys][2];
    for (auto& row : sums) {
        row[0] = _mm256_setzero_ps();
        row[1] = _mm256_setzero_ps();
    }
    for (std::int64_t j = 0; j < depth; ++j) {
        const __m256 left = _mm256_loadu_ps(panel + j * kPanelQueries);
        const __m256 right = _mm256_loadu_ps(panel + j * kPanelQueries + 8);
#pragma GCC unroll 6
        for (std::int64_t row = 0; row < kTileKeys; ++row) {
            const __m256 key = _mm256_broadcast_ss(keys + row * kWidenedStride + j);
            sums[row][0] = _mm256_fmadd_ps(key, left, sums[row][0]);
            sums[row][1] = _mm256_fmadd_ps(key, right, sums[row][1]);
        }
    }
#pragma GCC unroll 6
    for (std::int64_t row = 0; row < kTileKeys; ++row) {
        float* const out = scores + row * score_stride;
        if (first) {
            _mm256_storeu_ps(out, sums[row][0]);
            _mm256_storeu_ps(out + 8, sums[row][1]);
        } else {
            _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sums[row][0]));
            _mm256_storeu_ps(out + 8, _mm256_add_ps(_mm256_loadu_ps(out + 8), sums[row][1]));
        }
    }
}

void multiply(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
              std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride, bool first) {
    for (std::int64_t panel = 0; panel < n_panels; ++panel) {
        for (std::int64_t tile = 0; tile < n_tiles; ++tile) {
            multiply_tile(keys + tile * kTileKeys * kWidenedStride, panels + panel * panel_stride, depth,
                          scores + tile * kTileKeys * score_stride + panel * kPanelQueries, score_stride, first);
        }
    }
}

}  // namespace

constinit const WhitenedTopkKernels kWhitenedTopk = {.rows = {.f32 = {widen<float>, exact_score<float>},
                                                              .bf16 = {widen<BFloat16>, exact_score<BFloat16>},
                                                              .f16 = {widen<Float16>, exact_score<Float16>}},
                                                     .float32 = {.multiply = multiply, .select = select_scores<Simd>}};

}  // namespace rep_fast::avx2
