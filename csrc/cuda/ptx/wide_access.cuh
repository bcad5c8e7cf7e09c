// Accesses of 16 and 8 bytes, one instruction each (ld.v4.b32, st.v4.b32, st.v2.b32, ld.v2.f64, st.v2.f64): a device
// stops at an address that is not a multiple of the size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

namespace detail {
inline void check_multiple(const void* address, unsigned size) {
    if (reinterpret_cast<std::uintptr_t>(address) % size != 0) {
        throw cuda_on_cpu::ExecutionError("a wide access: the address is not a multiple of the size");
    }
}
}  // namespace detail

inline uint4 load_16(const void* from) {
    detail::check_multiple(from, 16);
    return *static_cast<const uint4*>(from);
}
inline void store_16(void* to, const uint4& words) {
    detail::check_multiple(to, 16);
    *static_cast<uint4*>(to) = words;
}
inline void store_8(void* to, uint2 words) {
    detail::check_multiple(to, 8);
    *static_cast<uint2*>(to) = words;
}
inline double2 load_pair(const double* from) {
    detail::check_multiple(from, 16);
    return *reinterpret_cast<const double2*>(from);
}
inline void store_pair(double* to, const double2& pair) {
    detail::check_multiple(to, 16);
    *reinterpret_cast<double2*>(to) = pair;
}

#else

__device__ inline uint4 load_16(const void* from) {
    return *static_cast<const uint4*>(from);
}
__device__ inline void store_16(void* to, const uint4& words) {
    *static_cast<uint4*>(to) = words;
}
__device__ inline void store_8(void* to, uint2 words) {
    *static_cast<uint2*>(to) = words;
}
__device__ inline double2 load_pair(const double* from) {
    return *reinterpret_cast<const double2*>(from);
}
__device__ inline void store_pair(double* to, const double2& pair) {
    *reinterpret_cast<double2*>(to) = pair;
}

#endif

}  // namespace rep_fast::cuda::ptx
