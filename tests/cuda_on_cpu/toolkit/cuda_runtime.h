// What our CUDA sources use of the toolkit's header of this name, in terms of the executor. Found instead of the
// toolkit's only by the test build.
#pragma once

#include <bit>
#include <cfenv>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "executor.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __grid_constant__

using dim3 = cuda_on_cpu::Dim3;
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) double2 {
    double x, y;
};
using cudaStream_t = void*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;

// One device, the executor.
inline const char* cudaGetErrorName(cudaError_t) {
    return "cudaSuccess";
}
inline const char* cudaGetErrorString(cudaError_t) {
    return "no error";
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 3;  // so that persistent blocks have several tiles
    return cudaSuccess;
}

#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())
#define blockDim (::cuda_on_cpu::block_size())
#define gridDim (::cuda_on_cpu::grid_size())

inline void __syncthreads() {
    cuda_on_cpu::block_barrier();
}
inline int __syncthreads_or(int predicate) {
    return cuda_on_cpu::block_any(predicate != 0) ? 1 : 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_on_cpu::warp_barrier(mask);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return cuda_on_cpu::shuffle(mask, value, static_cast<unsigned>(source) % cuda_on_cpu::kWarpSize);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return cuda_on_cpu::shuffle(mask, value, cuda_on_cpu::lane() ^ static_cast<unsigned>(lanes));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    const unsigned source = cuda_on_cpu::lane() + delta;
    return cuda_on_cpu::shuffle(mask, value, source < cuda_on_cpu::kWarpSize ? source : cuda_on_cpu::lane());
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    const unsigned own = cuda_on_cpu::lane();
    return cuda_on_cpu::shuffle(mask, value, own >= delta ? own - delta : own);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const cuda_on_cpu::WarpWords words = cuda_on_cpu::exchange(mask, predicate != 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < cuda_on_cpu::kWarpSize; ++lane) {
        votes |= static_cast<unsigned>(words[lane]) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == mask;
}

// No two threads run at once, so an atomic is the plain operation.
template <class T>
T atomicAdd(T* address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <class T>
T atomicMax(T* address, T value) {
    const T old = *address;
    *address = old < value ? value : old;
    return old;
}
template <class T>
T atomicMin(T* address, T value) {
    const T old = *address;
    *address = value < old ? value : old;
    return old;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
    const T old = *address;
    *address = old == expected ? value : old;
    return old;
}
template <class T>
T atomicExch(T* address, T value) {
    const T old = *address;
    *address = value;
    return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int __popc(unsigned bits) {
    return std::popcount(bits);
}
inline int __ffs(int bits) {
    return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}
inline int __clz(int bits) {
    return std::countl_zero(static_cast<unsigned>(bits));
}
inline float __uint_as_float(unsigned bits) {
    return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
    return std::bit_cast<unsigned>(value);
}
inline float __fmaf_rn(float a, float b, float c) {
    return std::fma(a, b, c);
}
// Rounded up and down, as the names say; volatile keeps the compiler from rounding at its own time.
inline float __fmaf_ru(float a, float b, float c) {
    const int before = std::fegetround();
    std::fesetround(FE_UPWARD);
    const volatile float x = a, y = b, z = c;
    const volatile float rounded = std::fma(x, y, z);
    std::fesetround(before);
    return rounded;
}
inline float __double2float_rd(double value) {
    const auto nearest = static_cast<float>(value);
    return static_cast<double>(nearest) > value ? std::nextafter(nearest, -INFINITY) : nearest;
}
inline float __double2float_ru(double value) {
    return -__double2float_rd(-value);
}
inline float __fmul_ru(float a, float b) {
    return __double2float_ru(static_cast<double>(a) * static_cast<double>(b));  // the product is exact
}
inline float __int2float_ru(int value) {
    return __double2float_ru(static_cast<double>(value));
}
