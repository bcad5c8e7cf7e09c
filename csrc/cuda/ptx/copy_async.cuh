// cp.async: copies from global to shared memory that the thread does not wait for (sm_80 and up). They are there, for
// the thread that asked, after wait_for_copies; for others after a barrier behind that.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

namespace detail {
inline void copy_or_zero(void* shared, const void* global, int size, int n_bytes) {
    static constexpr unsigned char zeros[16] = {};
    if (reinterpret_cast<std::uintptr_t>(shared) % size != 0 || reinterpret_cast<std::uintptr_t>(global) % size != 0) {
        throw cuda_on_cpu::ExecutionError("cp.async: an address is not a multiple of the size");
    }
    cuda_on_cpu::copy_later(shared, global, static_cast<std::size_t>(n_bytes));
    cuda_on_cpu::copy_later(static_cast<unsigned char*>(shared) + n_bytes, zeros,
                            static_cast<std::size_t>(size - n_bytes));
}
}  // namespace detail

inline void copy_16_async(void* shared, const void* global, int n_bytes) {
    detail::copy_or_zero(shared, global, 16, n_bytes);
}
inline void copy_4_async(void* shared, const void* global, int n_bytes) {
    detail::copy_or_zero(shared, global, 4, n_bytes);
}
inline void commit_copies() {
    cuda_on_cpu::commit_copies();
}
template <int kPending>
void wait_for_copies() {
    cuda_on_cpu::wait_for_copies(kPending);
}

#else

// cp.async.cg.shared.global [shared], [global], 16, n_bytes: 16 bytes, of which those from n_bytes on are zeros and are
// not read. Both addresses are multiples of 16.
__device__ inline void copy_16_async(void* shared, const void* global, int n_bytes) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(n_bytes) : "memory");
}

// cp.async.ca.shared.global [shared], [global], 4, n_bytes: the same for 4 bytes.
__device__ inline void copy_4_async(void* shared, const void* global, int n_bytes) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(n_bytes) : "memory");
}

// cp.async.commit_group: what was asked for since the last one becomes a group.
__device__ inline void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group kPending: all groups but the kPending youngest have landed.
template <int kPending>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

}  // namespace rep_fast::cuda::ptx
