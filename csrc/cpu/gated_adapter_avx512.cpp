// AVX-512 bodies of gated_adapter. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/gated_adapter.h"
#include "cpu/gelu.h"
#include "cpu/simd_avx512.h"

namespace rep_fast::avx512 {
namespace {

void dots_f32(const DotBlock<float, float>& block) {
    dot_block<Simd>(block);
}

void dots_bf16(const DotBlock<float, BFloat16>& block) {
    dot_block<Simd>(block);
}

template <class T>
void widen(const T* from, std::int64_t n, float* to) {
    widen_row<Simd>(from, n, to);
}

float gate(const float* products, const float* b1, const float* w2, std::int64_t n) {
    return gate_sum<Simd>(products, b1, w2, n);
}

}  // namespace

constinit const GatedAdapterKernels kGatedAdapter = {
    .dots_f32 = dots_f32,
    .dots_bf16 = dots_bf16,
    .widen_f32 = widen<float>,
    .widen_bf16 = widen<BFloat16>,
    .widen_f16 = widen<Float16>,
    .gate_sum = gate,
};

}  // namespace rep_fast::avx512
