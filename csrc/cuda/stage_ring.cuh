// A ring of stages in shared memory between warps that bring tiles and warpgroups that multiply them (sm_90a). Every
// stage has mbarriers which say that it may be read and that it may be overwritten.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"
#include "cuda/warp_sum.cuh"

namespace rep_fast::cuda {

inline constexpr int kGroupRows = 64;  // of a product by a warpgroup
inline constexpr int kGroupThreads = 4 * kLanes;

// Place in the ring of stages; the parity is that of the stage's phase under way.
template <int kStages>
struct Turn {
    int stage = 0;
    unsigned parity = 0;
    __device__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ inline void wait_for(std::uint64_t& barrier, unsigned parity) {
    while (!ptx::mbarrier_try_wait_parity(&barrier, parity)) {
    }
}

// The warp has read the stage; its copies may be overwritten when all warps have.
__device__ inline void release(std::uint64_t& barrier) {
    __syncwarp();
    if (threadIdx.x % kLanes == 0) {
        ptx::mbarrier_arrive(&barrier);
    }
}

}  // namespace rep_fast::cuda
