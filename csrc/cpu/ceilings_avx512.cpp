// Multiply-adds of 16 float32. Internal linkage only, no standard library: see core/dispatch.h.
#include <immintrin.h>

#include "cpu/ceilings.h"

namespace rep_fast::avx512 {
namespace {

float run_float32(std::int64_t rounds) {
    __m512 sums[kCeilingSums];
    for (int i = 0; i < kCeilingSums; ++i) {
        sums[i] = _mm512_set1_ps(static_cast<float>(i));
    }
    const __m512 a = _mm512_set1_ps(0.999f);
    const __m512 b = _mm512_set1_ps(1e-3f);
    for (std::int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
        for (int i = 0; i < kCeilingSums; ++i) {
            sums[i] = _mm512_fmadd_ps(sums[i], a, b);
        }
    }
    __m512 total = sums[0];
    for (int i = 1; i < kCeilingSums; ++i) {
        total = _mm512_add_ps(total, sums[i]);
    }
    return _mm512_cvtss_f32(total);
}

}  // namespace

constinit const CeilingLoop kFloat32Ceiling = {run_float32, kCeilingSums * 16 * 2};

}  // namespace rep_fast::avx512
