// Element types on the device: exact widening of the 16-bit floats, as core/dtype.h does it on the host, and rounding
// to them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/dtype.h"
#include "cuda/ptx/convert.cuh"

namespace rep_fast::cuda {

__device__ inline float widened(float value) {
    return value;
}

__device__ inline float widened(BFloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ inline float widened(Float16 value) {
    return ptx::widen_half(value.bits);
}

// Rounding to nearest, ties to even.
template <class T>
__device__ inline T narrowed(float value);

template <>
__device__ inline float narrowed<float>(float value) {
    return value;
}

template <>
__device__ inline BFloat16 narrowed<BFloat16>(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) {
        return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};  // rounding could make an infinity of it
    }
    return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
__device__ inline Float16 narrowed<Float16>(float value) {
    const unsigned bits = __float_as_uint(value);
    const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
    const unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x47800000u) {  // 2¹⁶ and above, infinity, NaN
        return {static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u))};
    }
    if (magnitude < 0x38800000u) {  // below 2⁻¹⁴: adding ½ leaves the multiple of 2⁻²⁴ in the low bits, rounded
        const float shifted = __uint_as_float(magnitude) + 0.5f;
        return {static_cast<std::uint16_t>(sign | (__float_as_uint(shifted) - 0x3f000000u))};
    }
    const unsigned rounded = magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u);
    return {static_cast<std::uint16_t>(sign | (rounded >> 13))};
}

}  // namespace rep_fast::cuda
