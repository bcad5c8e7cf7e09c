// AVX-512 bodies of gated_adapter. Internal linkage only, no standard library: see core/dispatch.h.
#include "cpu/gated_adapter.h"
#include "cpu/simd_avx512.h"

namespace rep_fast::avx512 {
namespace {

void dots_f32(const DotBlock<float>& block) {
    dot_block<Simd>(block);
}

void dots_bf16(const DotBlock<BFloat16>& block) {
    dot_block<Simd>(block);
}

}  // namespace

constinit const GatedAdapterKernels kGatedAdapter = {dots_f32, dots_bf16};

}  // namespace rep_fast::avx512
