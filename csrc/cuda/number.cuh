// Element types on the device: exact widening of the 16-bit floats, as core/dtype.h does it on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"

namespace rep_fast::cuda {

__device__ inline float widened(float value) {
    return value;
}

__device__ inline float widened(BFloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ inline float widened(Float16 value) {
    const unsigned sign = static_cast<unsigned>(value.bits & 0x8000u) << 16;
    const unsigned magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity and NaN
        return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    }
    if (magnitude < 0x400u) {  // zero and subnormals: magnitude · 2⁻²⁴ is exact in float
        return __uint_as_float(sign | __float_as_uint(static_cast<float>(magnitude) * 0x1p-24f));
    }
    return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace rep_fast::cuda
