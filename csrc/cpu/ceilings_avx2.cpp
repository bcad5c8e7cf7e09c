// Multiply-adds of 8 float32. Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/ceilings.h"

namespace rep_fast::avx2 {
namespace {

float run_float32(std::int64_t rounds) {
    __m256 sums[kCeilingSums];
    for (int i = 0; i < kCeilingSums; ++i) {
        sums[i] = _mm256_set1_ps(static_cast<float>(i));
    }
    const __m256 a = _mm256_set1_ps(0.999f);
    const __m256 b = _mm256_set1_ps(1e-3f);
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kCeilingSums; ++i) {
            sums[i] = _mm256_fmadd_ps(sums[i], a, b);
        }
    }
    __m256 total = sums[0];
    for (int i = 1; i < kCeilingSums; ++i) {
        total = _mm256_add_ps(total, sums[i]);
    }
    return _mm256_cvtss_f32(total);
}

}  // namespace

constinit const CeilingKernels kCeilings = {.float32 = {run_float32, kCeilingSums * 8 * 2}, .bf16 = {}, .int8 = {}};

}  // namespace rep_fast::avx2
