// What the copy engine must know of a matrix before `ptx::copy_box` can bring boxes of it. The driver encodes it; it is
// asked for through the runtime, so that nothing links against libcuda and the module imports without a driver.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/error.h"
#include "cuda/check.cuh"
#include "cuda/ptx/tma.cuh"

namespace rep_fast::cuda {

// Rows of 16-bit or 8-bit numbers on the device; element (i, j) is data[i * row_stride + j].
struct BoxedMatrix {
    const void* data = nullptr;
    std::int64_t n_rows = 0;
    std::int64_t n_columns = 0;
    std::int64_t row_stride = 0;
    int element_bytes = 2;
};

// Whether the copy engine takes the matrix: rows begin at multiples of 16 bytes and do not overlap, as those of an
// expanded tensor do.
inline bool has_tensor_map(const BoxedMatrix& matrix) {
    constexpr std::int64_t kMost = std::int64_t{1} << 31;  // coordinates are ints
    const bool begins_well =
        reinterpret_cast<std::uintptr_t>(matrix.data) % 16 == 0 && matrix.row_stride * matrix.element_bytes % 16 == 0;
    return begins_well && matrix.row_stride >= matrix.n_columns && matrix.n_rows > 0 && matrix.n_rows < kMost &&
           matrix.n_columns > 0 && matrix.n_columns < kMost;
}

#ifdef REP_FAST_CUDA_ON_CPU

inline ptx::TensorMap make_tensor_map(const BoxedMatrix& matrix, int box_rows) {
    REP_FAST_CHECK(has_tensor_map(matrix) && box_rows >= 1 && box_rows <= 256, "no tensor map for such a matrix");
    const std::int64_t size = matrix.element_bytes;
    return {static_cast<const unsigned char*>(matrix.data),
            matrix.n_rows,
            matrix.n_columns * size,
            matrix.row_stride * size,
            matrix.element_bytes,
            box_rows};
}

#else

namespace detail {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult answer = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    constexpr unsigned kSince = 12000;
    REP_FAST_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kSince, cudaEnableDefault, &answer));
#else
    REP_FAST_CUDA_CHECK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &answer));
#endif
    REP_FAST_CHECK(answer == cudaDriverEntryPointSuccess && found != nullptr,
                   "the driver has no cuTensorMapEncodeTiled; install one for CUDA 12 or newer");
    return reinterpret_cast<EncodeTiled>(found);
}

}  // namespace detail

// For boxes of `box_rows` (at most 256) rows of 128 bytes with the 128-byte swizzle; zeros outside the matrix.
inline ptx::TensorMap make_tensor_map(const BoxedMatrix& matrix, int box_rows) {
    ptx::TensorMap map;
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(matrix.n_columns), static_cast<cuuint64_t>(matrix.n_rows)};
    const cuuint64_t stride_bytes[1] = {static_cast<cuuint64_t>(matrix.row_stride * matrix.element_bytes)};
    const cuuint32_t box[2] = {static_cast<cuuint32_t>(ptx::kBoxRowBytes / matrix.element_bytes),
                               static_cast<cuuint32_t>(box_rows)};
    const cuuint32_t steps[2] = {1, 1};
    // what the bits mean does not matter to a copy
    const auto type = matrix.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
    const CUresult status = detail::encode_tiled()(
        &map, type, 2, const_cast<void*>(matrix.data), sizes, stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    REP_FAST_CHECK(status == CUDA_SUCCESS, "no tensor map of " << matrix.n_rows << " × " << matrix.n_columns
                                                               << " numbers, rows " << matrix.row_stride
                                                               << " apart: CUDA error " << static_cast<int>(status));
    return map;
}

#endif

}  // namespace rep_fast::cuda
