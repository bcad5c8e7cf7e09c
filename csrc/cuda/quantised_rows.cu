// Quantisation of rows for every architecture: a block finds a row's largest entry, then rounds it.
//
// A thread takes eight neighbours of every 2048 columns; the second look at the row hits L1, since the blocks of a
// multiprocessor hold some 200 KB of rows. Scale and dither of a column share 4 bytes, which halves what every row
// reads of them. Bytes: 2·M read and M written per row of bfloat16, and 8·M from L1. Limit: memory. Registers,
// occupancy, time: not measured yet on a device.
#include <cuda_runtime.h>

#include <limits>

#include "core/error.h"
#include "cuda/eight.cuh"
#include "cuda/launch.cuh"
#include "cuda/number.cuh"
#include "cuda/ptx/wide_access.cuh"
#include "cuda/quantised_rows.h"
#include "cuda/warp_sum.cuh"

namespace rep_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr std::int64_t kStride = kThreads * kEight;  // columns that the block looks at in one go
static_assert(kQuantisedMultiple % kEight == 0, "a thread writes eight bytes at once");

constexpr unsigned kMagnitude = 0x7fffffffu;  // without its sign a float32 orders as an integer, NaN above infinity
constexpr unsigned kNotFinite = 0x7f800000u;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct QuantisationShared {
    unsigned largest[kWarps];
    int squares[kWarps];
};

// One step of SplitMix64, as in cpu/dither.cpp.
__device__ inline std::uint64_t mixed(std::uint64_t state) {
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
    return state ^ (state >> 31);
}

__global__ void __launch_bounds__(kThreads)
    draw_dither_kernel(std::uint64_t seed, std::uint64_t whose, std::int32_t* dither, std::int64_t n) {
    constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15u;
    const std::int64_t j = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (j < n) {
        const std::uint64_t stream = mixed(mixed(seed + kGolden) + whose * kGolden);
        dither[j] = static_cast<std::int32_t>(mixed(stream + (static_cast<std::uint64_t>(j) + 1) * kGolden) >> 48);
    }
}

// 2¹⁶/s of a row, as fixed_point() of cpu/dither.h.
__device__ inline float per_step_of(float largest) {
    const double least = 127.0 * 0x1p-60;
    const auto wide = static_cast<double>(largest);
    return static_cast<float>(127.0 * 0x1p16 * (1.0 - 0x1p-21) / (wide > least ? wide : least));
}

// One row and what its columns are scaled and dithered with.
template <class Key>
struct Row {
    const Key* values;
    const std::int32_t* columns;
    std::int64_t width;
    bool sixteen_bytes;

    // Eight entries from `first` on, zeros behind the width.
    __device__ void load(std::int64_t first, float (&entries)[kEight]) const {
        if (sixteen_bytes && first + kEight <= width) {
            const Eight<Key> loaded = load_eight(values + first);
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                entries[i] = loaded[i];
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            entries[i] = first + i < width ? widened(values[first + i]) : 0.0f;
        }
    }

    __device__ Eight<float> load_columns(std::int64_t first) const {
        return load_eight(reinterpret_cast<const float*>(columns + first));
    }
};

__device__ inline float scale_of(float column) {
    return __uint_as_float(__float_as_uint(column) & 0xffff0000u);
}

__device__ inline int dither_of(float column) {
    return static_cast<int>(__float_as_uint(column) & 0xffffu);
}

// The bits of the row's largest scaled magnitude, in every thread; those of a NaN are above all others.
template <class Key>
__device__ unsigned largest_of(const Row<Key>& row, std::int64_t padded_width, QuantisationShared& shared) {
    unsigned largest = 0;
    for (std::int64_t first = threadIdx.x * kEight; first < padded_width; first += kStride) {
        float entries[kEight];
        row.load(first, entries);
        const Eight<float> columns = row.load_columns(first);
#pragma unroll
        for (int i = 0; i < kEight; ++i) {
            const unsigned bits = __float_as_uint(entries[i] * scale_of(columns[i])) & kMagnitude;
            largest = bits > largest ? bits : largest;
        }
    }
    for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        const unsigned other = __shfl_xor_sync(kAllLanes, largest, lanes);
        largest = other > largest ? other : largest;
    }
    if (threadIdx.x % kLanes == 0) {
        shared.largest[threadIdx.x / kLanes] = largest;
    }
    __syncthreads();
    for (const unsigned other : shared.largest) {
        largest = other > largest ? other : largest;
    }
    return largest;
}

// (round(x · scale · per_step) + dither) >> 16 of eight entries, as bytes; adds their squares.
__device__ inline uint2 rounded(const float (&entries)[kEight], const Eight<float>& columns, float per_step,
                                int& square) {
    unsigned words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < kEight; ++i) {
        const auto fixed = static_cast<int>(rintf(entries[i] * scale_of(columns[i]) * per_step));
        const int value = (fixed + dither_of(columns[i])) >> 16;
        square += value * value;
        words[i / 4] |= (static_cast<unsigned>(value) & 0xffu) << (i % 4 * 8);
    }
    return {words[0], words[1]};
}

// Rounds the row; the sum of squares, which fits an int up to the width of the sums' products, in thread 0.
template <class Key>
__device__ int round_row(const Row<Key>& row, std::int64_t padded_width, float per_step, std::int8_t* values,
                         QuantisationShared& shared) {
    int square = 0;
    for (std::int64_t first = threadIdx.x * kEight; first < padded_width; first += kStride) {
        float entries[kEight];
        row.load(first, entries);
        ptx::store_8(values + first, rounded(entries, row.load_columns(first), per_step, square));
    }
    square = warp_sum(square);
    if (threadIdx.x % kLanes == 0) {
        shared.squares[threadIdx.x / kLanes] = square;
    }
    __syncthreads();
    int sum = 0;
    for (const int other : shared.squares) {
        sum += other;
    }
    return sum;
}

// Of a row whose scaled entries are not finite: its margin says whether its own are.
template <class Key>
__device__ void give_up(const Row<Key>& row, std::int64_t number, std::int64_t first_id, const QuantisedRows& found) {
    int is_bad = 0;
    for (std::int64_t j = threadIdx.x; j < row.width; j += kThreads) {
        is_bad |= (__float_as_uint(widened(row.values[j])) & kMagnitude) >= kNotFinite ? 1 : 0;
    }
    is_bad = __syncthreads_or(is_bad);
    if (threadIdx.x != 0) {
        return;
    }
    found.steps[number] = 0.0f;
    found.margins[number] = is_bad != 0 ? kNaN : kInfinity;
    if (is_bad != 0 && found.n_nonfinite != nullptr) {
        atomicAdd(reinterpret_cast<unsigned long long*>(found.n_nonfinite), 1ull);
        atomicMin(reinterpret_cast<long long*>(found.first_nonfinite), static_cast<long long>(first_id + number));
    }
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    quantise_rows_kernel(KeyChunk rows, const std::int32_t* columns, bool sixteen_bytes, double constant,
                         std::int64_t first_id, QuantisedRows found) {
    auto& shared = shared_as<QuantisationShared>();
    const std::int64_t number = blockIdx.x;
    const Row<Key> row{static_cast<const Key*>(rows.data) + number * rows.row_stride, columns, rows.key_dim,
                       sixteen_bytes};
    const unsigned largest = largest_of(row, found.padded_width, shared);
    if (largest >= kNotFinite) {  // the same for all threads
        give_up(row, number, first_id, found);
        return;
    }
    const float per_step = per_step_of(__uint_as_float(largest));
    std::int8_t* const values = found.values + number * found.padded_width;
    const int square = round_row(row, found.padded_width, per_step, values, shared);
    if (threadIdx.x == 0) {
        const auto step = static_cast<float>(0x1p16 / static_cast<double>(per_step));
        const double margin = constant * static_cast<double>(step) * sqrt(static_cast<double>(square));
        found.steps[number] = step;
        found.margins[number] = static_cast<float>(margin * (1.0 + 0x1p-22));  // covers the conversion's rounding
    }
}

template <class Key>
void quantise_typed(const KeyChunk& rows, const std::int32_t* columns, double constant, std::int64_t first_id,
                    const QuantisedRows& found, cudaStream_t stream) {
    const bool sixteen_bytes = allows_sixteen_bytes(rows.data, rows.row_stride, sizeof(Key));
    launch("quantise_rows", quantise_rows_kernel<Key>,
           {dim3(static_cast<unsigned>(rows.n_keys)), dim3(kThreads), sizeof(QuantisationShared), stream}, rows,
           columns, sixteen_bytes, constant, first_id, found);
}

}  // namespace

void draw_dither(std::uint64_t seed, std::uint64_t whose, std::int32_t* dither, std::int64_t n, void* stream) {
    if (n == 0) {
        return;
    }
    const auto n_blocks = static_cast<unsigned>((n + kThreads - 1) / kThreads);
    launch("draw_dither", draw_dither_kernel, {dim3(n_blocks), dim3(kThreads), 0, static_cast<cudaStream_t>(stream)},
           seed, whose, dither, n);
}

void quantise_rows(const KeyChunk& rows, const std::int32_t* columns, double constant, std::int64_t first_id,
                   const QuantisedRows& found, void* stream) {
    REP_FAST_CHECK(found.padded_width >= rows.key_dim && found.padded_width % kQuantisedMultiple == 0,
                   "rows of " << rows.key_dim << " are padded to a multiple of " << kQuantisedMultiple << ", not to "
                              << found.padded_width);
    REP_FAST_CHECK(rows.n_keys < std::numeric_limits<std::int32_t>::max(),
                   "a chunk of " << rows.n_keys << " keys is too long; cut it");
    if (rows.n_keys == 0) {
        return;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    switch (rows.dtype) {
        case DType::kFloat32:
            return quantise_typed<float>(rows, columns, constant, first_id, found, on);
        case DType::kBFloat16:
            return quantise_typed<BFloat16>(rows, columns, constant, first_id, found, on);
        case DType::kFloat16:
            return quantise_typed<Float16>(rows, columns, constant, first_id, found, on);
        default:
            REP_FAST_CHECK(false, "rows must be float32, bfloat16 or float16, got " << dtype_name(rows.dtype));
    }
}

}  // namespace rep_fast::cuda
