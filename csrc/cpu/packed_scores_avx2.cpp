// AVX2 body of packed_scores. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/packed_scores.h"
#include "cpu/panel_abs_sum.h"
#include "cpu/simd_avx2.h"

namespace rep_fast::avx2 {
namespace {

void abs_sum(const float* a, const float* b, std::int64_t depth, float* column_sums) {
    panel_abs_sum<Simd>(a, b, depth, column_sums);
}

}  // namespace

constinit const PackedScoresKernels kPackedScores = {abs_sum};

}  // namespace rep_fast::avx2
