// Second moments by tensor cores, for every architecture: mma.sync on tiles of 128 × 128 entries.
//
// A block owns one tile on or below the diagonal and walks over the tokens, 32 at a time through three stages of shared
// memory, filled by cp.async two stages ahead. Both operands are columns of the same keys, which lie token by token, so
// ldmatrix transposes both. Of the 8 warps two share the rows, four the columns: 64 × 32 entries each.
// Flops: T·M·(M + 128), bytes: 512·T per tile from L2 and 16 per entry and 4096 tokens for the total. Limit: tensor
// cores. Shared memory 51 KB. Registers, occupancy, time: not measured yet on a device.
#include <cuda_runtime.h>

#include "core/error.h"
#include "cuda/accumulate_moment.h"
#include "cuda/eight.cuh"
#include "cuda/launch.cuh"
#include "cuda/number.cuh"
#include "cuda/ptx/copy_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/warp_sum.cuh"

namespace rep_fast::cuda {
namespace {

constexpr int kTile = 128;
constexpr int kDepth = 32;  // tokens of a stage
constexpr int kStages = 3;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kPiece = 8;  // elements of a 16-byte copy
// Rows of a stage are 272 bytes apart: the 8 rows of a matrix then lie in different banks.
constexpr int kRow = kTile + kPiece;

constexpr int kRowWarps = 2, kColumnWarps = 4;
constexpr int kWarpRows = kTile / kRowWarps, kWarpColumns = kTile / kColumnWarps;
constexpr int kProductRows = 16, kProductColumns = 8, kProductDepth = 16;  // of one mma
constexpr int kRowTiles = kWarpRows / kProductRows, kColumnTiles = kWarpColumns / kProductColumns;
static_assert(kRowWarps * kColumnWarps == kWarps);
static_assert(kColumnTiles % 2 == 0, "ldmatrix brings two tiles of columns at once");
static_assert(kMomentChain % kDepth == 0 && kMomentTokens % kMomentChain == 0);

template <class Key>
struct MomentStage {
    alignas(16) Key rows[kDepth][kRow];
    alignas(16) Key columns[kDepth][kRow];
};
template <class Key>
struct MomentShared {
    MomentStage<Key> stages[kStages];
};

template <class Key>
struct Tokens {
    const Key* data;
    const bool* counts;
    std::int64_t n_tokens, key_dim, row_stride;
    bool sixteen_bytes;
};

using Products = float[kRowTiles][kColumnTiles][4];

// Asks for kTile columns of kDepth tokens, zeros in place of what does not count or is not there.
template <class Key>
__device__ inline void fetch(const Tokens<Key>& keys, std::int64_t token, std::int64_t first, Key (&to)[kDepth][kRow]) {
    constexpr int kPieces = kDepth * kTile / kPiece;
    for (int piece = static_cast<int>(threadIdx.x); piece < kPieces; piece += kThreads) {
        const int row = piece / (kTile / kPiece), column = piece % (kTile / kPiece) * kPiece;
        const bool counts = token + row < keys.n_tokens && (keys.counts == nullptr || keys.counts[token + row]);
        const std::int64_t n_left = counts ? keys.key_dim - (first + column) : 0;
        const int n = n_left >= kPiece ? kPiece : n_left > 0 ? static_cast<int>(n_left) : 0;
        const Key* const begin = n > 0 ? keys.data + (token + row) * keys.row_stride + first + column : keys.data;
        if (keys.sixteen_bytes) {
            ptx::copy_16_async(&to[row][column], begin, n * static_cast<int>(sizeof(Key)));
        } else {
            for (int i = 0; i < kPiece; ++i) {
                to[row][column + i] = i < n ? begin[i] : Key{0};
            }
        }
    }
}

template <class Key>
__device__ inline void multiply(const MomentStage<Key>& stage, int warp_row, int warp_column, Products& products) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, matrix = lane / 8;
#pragma unroll
    for (int k = 0; k < kDepth; k += kProductDepth) {
        unsigned rows[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
            ptx::load_transposed(
                rows[i], &stage.rows[k + matrix / 2 * 8 + lane % 8][warp_row + i * kProductRows + matrix % 2 * 8]);
        }
#pragma unroll
        for (int j = 0; j < kColumnTiles; j += 2) {
            unsigned columns[4];
            ptx::load_transposed(
                columns,
                &stage.columns[k + matrix % 2 * 8 + lane % 8][warp_column + j * kProductColumns + matrix / 2 * 8]);
            const unsigned left[2] = {columns[0], columns[1]}, right[2] = {columns[2], columns[3]};
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                ptx::mma_m16n8k16(products[i][j], rows[i], left, Key{});
                ptx::mma_m16n8k16(products[i][j + 1], rows[i], right, Key{});
            }
        }
    }
}

// to += from, from = 0.
__device__ inline void pass_on(Products& from, Products& to) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                to[i][j][entry] += from[i][j][entry];
                from[i][j][entry] = 0.0f;
            }
        }
    }
}

// Adds what lies on and below the diagonal; (row, column) is the warp's first entry.
__device__ inline void add_to_total(Products& sums, std::int64_t row, std::int64_t column, std::int64_t key_dim,
                                    double* total, std::int64_t total_stride) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
            for (int entry = 0; entry < 4; ++entry) {
                const std::int64_t r = row + i * kProductRows + entry / 2 * 8 + lane / 4;
                const std::int64_t c = column + j * kProductColumns + lane % 4 * 2 + entry % 2;
                if (r < key_dim && c <= r) {
                    total[r * total_stride + c] += static_cast<double>(sums[i][j][entry]);
                }
                sums[i][j][entry] = 0.0f;
            }
        }
    }
}

// Row of tiles that holds the tile of this number, tiles counted row by row up to the diagonal.
__device__ inline std::int64_t row_of_tile(std::int64_t number) {
    auto row = static_cast<std::int64_t>((sqrt(8.0 * static_cast<double>(number) + 1.0) - 1.0) / 2.0);
    while (row * (row + 1) / 2 > number) {
        --row;
    }
    while ((row + 1) * (row + 2) / 2 <= number) {
        ++row;
    }
    return row;
}

template <class Key>
__global__ void __launch_bounds__(kThreads, 1)
    moment_kernel(Tokens<Key> keys, double* total, std::int64_t total_stride) {
    auto& shared = shared_as<MomentShared<Key>>();
    const std::int64_t number = blockIdx.x, tile_row = row_of_tile(number);
    const std::int64_t row = tile_row * kTile, column = (number - tile_row * (tile_row + 1) / 2) * kTile;
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const int warp_row = warp / kColumnWarps * kWarpRows, warp_column = warp % kColumnWarps * kWarpColumns;
    Products products = {}, sums = {};
    for (int stage = 0; stage < kStages - 1; ++stage) {
        fetch(keys, stage * kDepth, row, shared.stages[stage].rows);
        fetch(keys, stage * kDepth, column, shared.stages[stage].columns);
        ptx::commit_copies();
    }
    int stage = 0;
    for (std::int64_t token = 0; token < keys.n_tokens; token += kDepth) {
        ptx::wait_for_copies<kStages - 2>();
        __syncthreads();  // this stage is there for all, and all are through with the one before
        const int next = stage == 0 ? kStages - 1 : stage - 1;
        fetch(keys, token + (kStages - 1) * kDepth, row, shared.stages[next].rows);
        fetch(keys, token + (kStages - 1) * kDepth, column, shared.stages[next].columns);
        ptx::commit_copies();
        multiply(shared.stages[stage], warp_row, warp_column, products);
        stage = stage == kStages - 1 ? 0 : stage + 1;
        const std::int64_t done = token + kDepth;
        if (done % kMomentChain == 0 || done >= keys.n_tokens) {
            pass_on(products, sums);
        }
        if (done % kMomentTokens == 0 || done >= keys.n_tokens) {
            add_to_total(sums, row + warp_row, column + warp_column, keys.key_dim, total, total_stride);
        }
    }
    ptx::wait_for_copies<0>();
}

template <class Key>
__global__ void __launch_bounds__(kThreads)
    count_kernel(Tokens<Key> keys, const bool* mask, std::int64_t first_id, TokenCounts found) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
    if (token >= keys.n_tokens) {
        return;  // the whole warp leaves
    }
    const bool is_wanted = mask == nullptr || mask[token];
    bool is_finite = true;
    for (std::int64_t i = lane; is_wanted && i < keys.key_dim; i += kLanes) {
        const float value = widened(keys.data[token * keys.row_stride + i]);
        is_finite = is_finite && value - value == 0.0f;
    }
    is_finite = __all_sync(kAllLanes, is_finite) != 0;
    if (lane != 0) {
        return;
    }
    found.counts[token] = is_wanted && is_finite;
    if (is_wanted && is_finite) {
        atomicAdd(reinterpret_cast<unsigned long long*>(found.n_counted), 1ull);
    } else if (is_wanted) {
        atomicAdd(reinterpret_cast<unsigned long long*>(found.n_nonfinite), 1ull);
        atomicMin(reinterpret_cast<long long*>(found.first_nonfinite), static_cast<long long>(first_id + token));
    }
}

template <class Key>
Tokens<Key> tokens_of(const MomentKeys& keys, const bool* counts) {
    return {static_cast<const Key*>(keys.data),
            counts,
            keys.n_tokens,
            keys.key_dim,
            keys.row_stride,
            allows_sixteen_bytes(keys.data, keys.row_stride, sizeof(Key))};
}

template <class Key>
void count_typed(const MomentKeys& keys, const bool* mask, std::int64_t first_id, const TokenCounts& found,
                 cudaStream_t stream) {
    const auto n_blocks = static_cast<unsigned>((keys.n_tokens + kWarps - 1) / kWarps);
    launch("count_tokens", count_kernel<Key>, {dim3(n_blocks), dim3(kThreads), 0, stream},
           tokens_of<Key>(keys, nullptr), mask, first_id, found);
}

template <class Key>
void accumulate_typed(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                      cudaStream_t stream) {
    const std::int64_t n_tiles = (keys.key_dim + kTile - 1) / kTile;
    launch(
        "accumulate_moment", moment_kernel<Key>,
        {dim3(static_cast<unsigned>(n_tiles * (n_tiles + 1) / 2)), dim3(kThreads), sizeof(MomentShared<Key>), stream},
        tokens_of<Key>(keys, counts), total, total_stride);
}

}  // namespace

void count_tokens(const MomentKeys& keys, const bool* mask, std::int64_t first_id, const TokenCounts& found,
                  void* stream) {
    if (keys.n_tokens == 0) {
        return;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    switch (keys.dtype) {
        case DType::kFloat32:
            return count_typed<float>(keys, mask, first_id, found, on);
        case DType::kBFloat16:
            return count_typed<BFloat16>(keys, mask, first_id, found, on);
        case DType::kFloat16:
            return count_typed<Float16>(keys, mask, first_id, found, on);
        default:
            REP_FAST_CHECK(false, "keys must be float32, bfloat16 or float16, got " << dtype_name(keys.dtype));
    }
}

void accumulate_moment(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                       void* stream) {
    if (keys.n_tokens == 0 || keys.key_dim == 0) {
        return;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    switch (keys.dtype) {
        case DType::kBFloat16:
            return accumulate_typed<BFloat16>(keys, counts, total, total_stride, on);
        case DType::kFloat16:
            return accumulate_typed<Float16>(keys, counts, total, total_stride, on);
        default:
            REP_FAST_CHECK(false, "tensor cores multiply bfloat16 or float16 keys, got "
                                      << dtype_name(keys.dtype) << "; leave others to the library's product");
    }
}

}  // namespace rep_fast::cuda
