// Stores to shared memory that wgmma and the copy engine are to see (sm_90): they look at it another way than threads
// do, and a fence stands between a thread's stores and whatever tells them to look.
#pragma once

#include <cuda_runtime.h>

#include "cuda/ptx/wide_access.cuh"

#ifdef REP_FAST_CUDA_ON_CPU
#include <cstring>
#endif

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

// Nobody sees the store before the fence.
inline void store_16_shared(void* shared, const uint4& value) {
    detail::check_multiple(shared, 16);
    cuda_on_cpu::work_later([=] { std::memcpy(shared, &value, sizeof(uint4)); });
}
inline void fence_async_proxy() {
    cuda_on_cpu::commit_work();
    cuda_on_cpu::wait_for_work(0);
}

#else

// st.shared.v4.b32 [shared], value: 16 bytes, at a multiple of 16.
__device__ inline void store_16_shared(void* shared, const uint4& value) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// fence.proxy.async.shared::cta: the calling thread's stores before it are there for what the copy engine and wgmma are
// told behind it; by another thread, behind a barrier.
__device__ inline void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#endif

}  // namespace rep_fast::cuda::ptx
