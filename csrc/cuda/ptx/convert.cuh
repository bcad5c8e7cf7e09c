// Conversions of one instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

inline float widen_half(std::uint16_t bits) {
    return to_float(Float16{bits});
}

#else

// cvt.f32.f16: exact; a NaN stays one.
__device__ inline float widen_half(std::uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

#endif

}  // namespace rep_fast::cuda::ptx
