// AVX-512 bodies of the gate's gradient. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/gated_adapter_gradient.h"
#include "cpu/gelu_slope.h"
#include "cpu/simd_avx512.h"

namespace rep_fast::avx512 {
namespace {

void slopes(const SlopePanel& panel) {
    slope_panel<Simd>(panel);
}

void product(const float* a, const float* b, std::int64_t depth, std::int64_t n_rows, float* tile, bool first) {
    panel_product<Simd>(a, b, depth, tile, first, n_rows);
}

}  // namespace

constinit const GateGradientKernels kGateGradient = {.slopes = slopes, .product = product};

}  // namespace rep_fast::avx512
