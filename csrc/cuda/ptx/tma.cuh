// cp.async.bulk.tensor: the copy engine brings a box of a matrix from global to shared memory (sm_90). Boxes are one
// 128-byte line wide, 64 columns of 16 bits or 128 of 8, and swizzled: of a byte's address in shared memory, bits 4–6
// are changed by an exclusive or with bits 7–9, so that wgmma and 16-byte accesses down a column meet no bank twice.
// What of a box lies outside the matrix becomes zeros.
#pragma once

#include <cuda_runtime.h>

#ifndef REP_FAST_CUDA_ON_CPU
#include <cuda.h>
#endif

#include <cstdint>

#include "cuda/ptx/mbarrier.cuh"

namespace rep_fast::cuda::ptx {

inline constexpr int kBoxRowBytes = 128;
template <class Element>
inline constexpr int kBoxColumns = kBoxRowBytes / static_cast<int>(sizeof(Element));

// Where the swizzle puts the byte that would lie at `offset`; the box begins at a multiple of 1024.
__host__ __device__ constexpr std::uint32_t swizzled(std::uint32_t offset) {
    return offset ^ ((offset >> 7 & 7u) << 4);
}

#ifdef REP_FAST_CUDA_ON_CPU

struct TensorMap {
    const unsigned char* data = nullptr;
    std::int64_t n_rows = 0, row_bytes = 0, stride_bytes = 0;
    int element_bytes = 0;
    int box_rows = 0;
};

inline void copy_box(void* shared, const TensorMap* map, std::uint64_t* barrier, int column, int row) {
    const std::uint32_t begin = cuda_on_cpu::shared_offset(shared);
    if (begin % 128 != 0) {
        throw cuda_on_cpu::ExecutionError("cp.async.bulk.tensor: the box's address is not a multiple of 128");
    }
    unsigned char* const base = cuda_on_cpu::shared_at(0);
    cuda_on_cpu::happen_later([=, from = *map] {
        for (int i = 0; i < from.box_rows; ++i) {
            for (int j = 0; j < kBoxRowBytes; ++j) {
                const std::int64_t x = std::int64_t{column} * from.element_bytes + j, y = std::int64_t{row} + i;
                const bool is_inside = x >= 0 && x < from.row_bytes && y >= 0 && y < from.n_rows;
                base[swizzled(begin + static_cast<std::uint32_t>(i * kBoxRowBytes + j))] =
                    is_inside ? from.data[y * from.stride_bytes + x] : std::uint8_t{0};
            }
        }
        detail::complete_bytes(barrier, static_cast<unsigned>(from.box_rows) * kBoxRowBytes);
    });
}

#else

using TensorMap = CUtensorMap;

// cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [shared], [map, {column, row}],
// [barrier]: the box whose first element is (row, column); the barrier counts the bytes of the whole box. `map` is a
// __grid_constant__ parameter.
__device__ inline void copy_box(void* shared, const TensorMap* map, std::uint64_t* barrier, int column, int row) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const auto counter = static_cast<unsigned>(__cvta_generic_to_shared(barrier));
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(map), "r"(counter), "r"(column), "r"(row)
        : "memory");
}

#endif

}  // namespace rep_fast::cuda::ptx
