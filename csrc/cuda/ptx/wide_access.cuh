// Accesses of 16 and 8 bytes, one instruction each (ld.v4.b32, st.v2.b32): a device stops at an address that is not a
// multiple of the size.
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
inline void store_8(void* to, uint2 words) {
    detail::check_multiple(to, 8);
    *static_cast<uint2*>(to) = words;
}

#else

__device__ inline uint4 load_16(const void* from) {
    return *static_cast<const uint4*>(from);
}
__device__ inline void store_8(void* to, uint2 words) {
    *static_cast<uint2*>(to) = words;
}

#endif

}  // namespace rep_fast::cuda::ptx
