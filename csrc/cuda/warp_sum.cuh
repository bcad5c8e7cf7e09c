// Sums over the lanes of a warp in one fixed order, so that they depend on the numbers alone.
#pragma once

#include <cuda_runtime.h>

namespace rep_fast::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kLanes = 32;

// The sum of one value per lane, in every lane.
template <class T>
__device__ inline T warp_sum(T value) {
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        value += __shfl_xor_sync(kAllLanes, value, lanes);
    }
    return value;
}

namespace detail {

// While there are several values, a lane keeps half of them and gives the others to the lane `kAcross` away.
template <int kCount, int kAcross, class T>
__device__ inline T fold(T (&values)[kCount]) {
    if constexpr (kAcross == 0) {
        return values[0];
    } else if constexpr (kCount == 1) {
        values[0] += __shfl_xor_sync(kAllLanes, values[0], kAcross);
        return fold<1, kAcross / 2>(values);
    } else {
        const bool keeps_upper = (threadIdx.x & kAcross) != 0;
        T half[kCount / 2];
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const T given = keeps_upper ? values[i] : values[i + kCount / 2];
            const T kept = keeps_upper ? values[i + kCount / 2] : values[i];
            half[i] = kept + __shfl_xor_sync(kAllLanes, given, kAcross);
        }
        return fold<kCount / 2, kAcross / 2>(half);
    }
}

}  // namespace detail

// The number of the value whose sum `fold_sums` leaves in a lane.
template <int kCount>
__device__ constexpr int folded_index(int lane) {
    return lane * kCount / kLanes;
}

// kCount sums at once with kCount + log2(32 / kCount) − 1 shuffles instead of 5·kCount. Blocks of one dimension.
template <int kCount, class T>
__device__ inline T fold_sums(T (&values)[kCount]) {
    static_assert(kCount >= 1 && kCount <= kLanes && (kCount & (kCount - 1)) == 0, "lanes share values evenly");
    return detail::fold<kCount, kLanes / 2>(values);
}

}  // namespace rep_fast::cuda
