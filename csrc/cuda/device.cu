#include "cuda/check.cuh"
#include "cuda/device.h"

namespace rep_fast::cuda {

DeviceGuard::DeviceGuard(int device) {
    REP_FAST_CUDA_CHECK(cudaGetDevice(&before_));
    if (before_ != device) {
        REP_FAST_CUDA_CHECK(cudaSetDevice(device));
        is_changed_ = true;
    }
}

DeviceGuard::~DeviceGuard() {
    if (is_changed_) {
        static_cast<void>(cudaSetDevice(before_));  // it was the thread's device a moment ago
    }
}

}  // namespace rep_fast::cuda
