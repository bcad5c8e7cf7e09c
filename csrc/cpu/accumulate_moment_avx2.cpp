// AVX2 body of accumulate_moment. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/accumulate_moment.h"
#include "cpu/panel_product.h"
#include "cpu/simd_avx2.h"

namespace rep_fast::avx2 {
namespace {

void product(const float* a, const float* b, std::int64_t depth, float* tile, bool first) {
    panel_product<Simd>(a, b, depth, tile, first);
}

}  // namespace

constinit const AccumulateMomentKernels kAccumulateMoment = {.product = product};

}  // namespace rep_fast::avx2
