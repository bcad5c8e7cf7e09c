// setmaxnreg: warpgroups of one block share its registers unevenly (sm_90a alone). A block begins with the same number
// for every thread; one group gives some back before another takes them. All threads of a group ask, once, for a
// multiple of 8 between 24 and 256.
#pragma once

#include <cuda_runtime.h>

namespace rep_fast::cuda::ptx {

#ifdef REP_FAST_CUDA_ON_CPU

template <int kCount>
void keep_registers() {}
template <int kCount>
void take_registers() {}

#else

// setmaxnreg.dec.sync.aligned.u32 kCount: the thread's registers from here on, fewer than before.
template <int kCount>
__device__ inline void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// setmaxnreg.inc.sync.aligned.u32 kCount: more than before; waits until the block has so many to give.
template <int kCount>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

#endif

}  // namespace rep_fast::cuda::ptx
