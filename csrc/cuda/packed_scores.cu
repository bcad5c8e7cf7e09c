// Sums of absolute products for every architecture: float32 multiply-adds, tiles of 128 × 128 entries, 16 tokens at a
// time in two stages of shared memory.
//
// A block owns 128 columns of b and every n_splits-th tile of a; a thread holds 8 × 8 entries, whose absolute values
// are added up as soon as all tokens are in. A second launch adds the splits in their order. Flops: 2·T·P·Q and 2·P·Q
// for the epilogue, bytes: 4·T·Q + 4·T·P per 128 columns, from L2. Limit: float32 units from some 64 tokens on. Shared
// memory 32 KB. Registers, occupancy, time: not measured yet on a device.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/eight.cuh"
#include "cuda/launch.cuh"
#include "cuda/packed_scores.h"
#include "cuda/ptx/copy_async.cuh"

namespace rep_fast::cuda {
namespace {

constexpr int kTile = 128;  // columns of a, and of b
constexpr int kDepth = 16;  // tokens of a stage
constexpr int kStages = 2;
constexpr int kThreads = 256;
constexpr int kSide = 16;  // threads along either side of a tile
constexpr int kStrip = 4;  // neighbouring columns of a thread, 16 bytes of shared memory
constexpr int kStrips = 2;
constexpr int kOwn = kStrip * kStrips;
static_assert(kSide * kSide == kThreads && kSide * kOwn == kTile);
// Enough for four on each of 132 processors; a constant, so that the bits do not depend on the device.
constexpr std::int64_t kWantedBlocks = 528;

struct TileStage {
    alignas(16) float a[kDepth][kTile];
    alignas(16) float b[kDepth][kTile];
};
struct AbsProductShared {
    TileStage stages[kStages];
};
struct ColumnSums {
    double sums[kSide][kTile];
};
static_assert(sizeof(ColumnSums) <= sizeof(AbsProductShared), "the sums take the stages' place");

struct Columns {
    const float* data;
    std::int64_t stride, n;
    bool sixteen_bytes;
};

// Asks for columns [first, first + kTile) of kDepth tokens, zeros where there are none.
__device__ inline void fetch(const Columns& from, std::int64_t n_tokens, std::int64_t token, std::int64_t first,
                             float (&to)[kDepth][kTile]) {
    constexpr int kPieces = kDepth * kTile / kStrip;
    for (int piece = static_cast<int>(threadIdx.x); piece < kPieces; piece += kThreads) {
        const int row = piece / (kTile / kStrip), column = piece % (kTile / kStrip) * kStrip;
        const bool is_token = token + row < n_tokens;
        const float* const begin = from.data + (token + row) * from.stride + first + column;
        const std::int64_t n_left = is_token ? from.n - (first + column) : 0;
        if (from.sixteen_bytes) {
            const int n = n_left >= kStrip ? kStrip : n_left > 0 ? static_cast<int>(n_left) : 0;
            ptx::copy_16_async(&to[row][column], n > 0 ? begin : from.data, n * static_cast<int>(sizeof(float)));
        } else {
            for (int i = 0; i < kStrip; ++i) {
                const bool is_there = i < n_left;
                ptx::copy_4_async(&to[row][column + i], is_there ? begin + i : from.data,
                                  is_there ? static_cast<int>(sizeof(float)) : 0);
            }
        }
    }
}

// The place of a thread's entry number i on its side of the tile.
__device__ inline int own_column(int side, int i) {
    return i / kStrip * (kTile / kStrips) + side * kStrip + i % kStrip;
}

__device__ inline void multiply(const TileStage& stage, int row_side, int column_side, float (&products)[kOwn][kOwn]) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
        float left[kOwn], right[kOwn];
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            left[i] = stage.a[k][own_column(row_side, i)];
            right[i] = stage.b[k][own_column(column_side, i)];
        }
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) {
                products[i][j] = __fmaf_rn(left[i], right[j], products[i][j]);
            }
        }
    }
}

__global__ void __launch_bounds__(kThreads)
    abs_product_kernel(Columns a, Columns b, std::int64_t n_tokens, double* partial) {
    auto& shared = shared_as<AbsProductShared>();
    const int row_side = static_cast<int>(threadIdx.x) / kSide, column_side = static_cast<int>(threadIdx.x) % kSide;
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kTile;
    double totals[kOwn] = {};
    for (std::int64_t row = static_cast<std::int64_t>(blockIdx.y) * kTile; row < a.n;
         row += static_cast<std::int64_t>(gridDim.y) * kTile) {
        float products[kOwn][kOwn] = {};
        fetch(a, n_tokens, 0, row, shared.stages[0].a);
        fetch(b, n_tokens, 0, column, shared.stages[0].b);
        ptx::commit_copies();
        int stage = 0;
        for (std::int64_t token = 0; token < n_tokens; token += kDepth) {
            // behind the last tokens everything asked for is zeros, and no one reads it
            fetch(a, n_tokens, token + kDepth, row, shared.stages[1 - stage].a);
            fetch(b, n_tokens, token + kDepth, column, shared.stages[1 - stage].b);
            ptx::commit_copies();
            ptx::wait_for_copies<1>();
            __syncthreads();  // everybody's copies of this stage have landed
            multiply(shared.stages[stage], row_side, column_side, products);
            __syncthreads();  // the stage is read, the next copies may overwrite it
            stage = 1 - stage;
        }
        ptx::wait_for_copies<0>();
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                sum += fabsf(products[i][j]);
            }
            totals[j] += static_cast<double>(sum);
        }
    }
    __syncthreads();  // nobody's copies land any more
    auto& columns = shared_as<ColumnSums>();
    for (int j = 0; j < kOwn; ++j) {
        columns.sums[row_side][own_column(column_side, j)] = totals[j];
    }
    __syncthreads();
    if (threadIdx.x < kTile && column + threadIdx.x < b.n) {
        double total = 0.0;
        for (int side = 0; side < kSide; ++side) {
            total += columns.sums[side][threadIdx.x];
        }
        partial[static_cast<std::int64_t>(blockIdx.y) * b.n + column + threadIdx.x] = total;
    }
}

__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(const double* partial, std::int64_t n_splits, std::int64_t n, double* sums) {
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (column >= n) {
        return;
    }
    double total = 0.0;
    for (std::int64_t split = 0; split < n_splits; ++split) {
        total += partial[split * n + column];
    }
    sums[column] = total;
}

std::int64_t tiles_of(std::int64_t n) {
    return (n + kTile - 1) / kTile;
}

std::int64_t splits_of(const AbsProductCall& call) {
    const std::int64_t n_columns = std::max<std::int64_t>(tiles_of(call.n_right), 1);
    return std::clamp<std::int64_t>((kWantedBlocks + n_columns - 1) / n_columns, 1,
                                    std::max<std::int64_t>(tiles_of(call.n_left), 1));
}

Columns columns_of(const float* data, std::int64_t stride, std::int64_t n) {
    return {data, stride, n, allows_sixteen_bytes(data, stride, sizeof(float))};
}

}  // namespace

std::size_t scratch_bytes(const AbsProductCall& call) {
    return static_cast<std::size_t>(splits_of(call) * call.n_right) * sizeof(double);
}

void abs_product_sum(const AbsProductCall& call, void* stream) {
    if (call.n_right == 0) {
        return;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    const std::int64_t n_splits = splits_of(call);
    const dim3 grid(static_cast<unsigned>(tiles_of(call.n_right)), static_cast<unsigned>(n_splits));
    launch("abs_product", abs_product_kernel, {grid, dim3(kThreads), sizeof(AbsProductShared), on},
           columns_of(call.a, call.a_stride, call.n_left), columns_of(call.b, call.b_stride, call.n_right),
           call.n_tokens, call.scratch);
    const auto n_blocks = static_cast<unsigned>((call.n_right + kThreads - 1) / kThreads);
    launch("add_splits", add_splits_kernel, {dim3(n_blocks), dim3(kThreads), 0, on}, call.scratch, n_splits,
           call.n_right, call.sums);
}

}  // namespace rep_fast::cuda
