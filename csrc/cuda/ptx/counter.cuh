// Waiting for a number in global memory that other blocks raise. Such blocks must all be there: a cooperative launch.
#pragma once

#include <cuda_runtime.h>

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

inline void wait_until_reached(const int* counter, int value) {
    cuda_on_cpu::wait_until([=] { return *counter >= value; });
}

#else

// ld.acquire.gpu.global.s32, again and again: what was written before the number was raised is there behind it, for
// this thread, and for others behind a barrier.
__device__ inline void wait_until_reached(const int* counter, int value) {
    int found;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
    } while (found < value);
}

#endif

}  // namespace rep_fast::cuda::ptx
