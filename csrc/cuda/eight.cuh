// Eight neighbours of a row at a time: 16-byte accesses where the row allows them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/number.cuh"
#include "cuda/ptx/wide_access.cuh"

namespace rep_fast::cuda {

inline constexpr int kEight = 8;

// Whether every row of a matrix begins where 16-byte accesses may.
inline bool allows_sixteen_bytes(const void* data, std::int64_t row_stride, std::int64_t element_bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && row_stride * element_bytes % 16 == 0;
}

template <class T>
struct Eight {
    static constexpr int kPieces = kEight * static_cast<int>(sizeof(T)) / 16;
    uint4 pieces[kPieces];

    // Element i widened; i is known when compiled.
    __device__ float operator[](int i) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(word(i));
        } else {
            const auto bits = static_cast<std::uint16_t>(word(i / 2) >> (i % 2 * 16));
            return widened(T{bits});
        }
    }

  private:
    __device__ unsigned word(int i) const {
        const uint4& piece = pieces[i / 4];
        switch (i % 4) {
            case 0:
                return piece.x;
            case 1:
                return piece.y;
            case 2:
                return piece.z;
            default:
                return piece.w;
        }
    }
};

template <class T>
__device__ inline Eight<T> load_eight(const T* from) {
    Eight<T> loaded;
#pragma unroll
    for (int i = 0; i < Eight<T>::kPieces; ++i) {
        loaded.pieces[i] = ptx::load_16(from + i * (16 / static_cast<int>(sizeof(T))));
    }
    return loaded;
}

// Columns that may be loaded eight at a time; what lies behind them is read one by one.
__device__ inline std::int64_t columns_in_eights(bool sixteen_bytes, std::int64_t n_columns) {
    return sixteen_bytes ? n_columns / kEight * kEight : 0;
}

}  // namespace rep_fast::cuda
