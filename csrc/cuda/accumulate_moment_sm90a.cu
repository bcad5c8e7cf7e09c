// Second moments on Hopper: wgmma on tiles of 128 × kColumns entries (sm_90a alone; elsewhere plain loops).
//
// A block is persistent and works on tiles on or below the diagonal, twelve rows of tiles together, column by column. A
// warp asks the copy engine for boxes of 64 tokens × 64 columns, kStages ahead; as keys lie token by token, both
// operands are transposed, which wgmma does on 16-bit elements by itself. Another warp clears the lines of tokens that
// do not count in what has landed, so that the multiplying warps know nothing of them. Two warpgroups multiply 64 rows
// each, in chains of kMomentChain tokens whose products are added up in registers, and go over the totals in float64
// every kMomentTokens, at different times: then the other group has the tensor cores for itself, as long as the ring
// has stages for it.
//
// Flops: T·M·(M + 128) at 128 columns and T·M·(M + 256) at 192. Bytes from L2: 256·(1 + kColumns / 128) per token and
// tile, one for 64 and for 77 flops, and about 20 for the totals per entry and 4096 tokens, from memory. Limit: tensor
// cores if L2 gives 10 TB/s (128 columns) or 8 (192) at 640 TFLOP/s; else L2, which is why there is a wide tile.
// Registers by ptxas 13.0: 168 at the launch, then 232 for each multiplying thread and 40 for the others; nothing is
// spilled. One block per multiprocessor. Not run or measured yet on a device: stages, tiles and their order are choices
// by arithmetic.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "core/error.h"
#include "cuda/accumulate_moment_sm90a.cuh"
#include "cuda/accumulate_moment_sm90a.h"
#include "cuda/eight.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/registers.cuh"
#include "cuda/tensor_map.cuh"

namespace rep_fast::cuda {
namespace {

// 65 536 registers for two groups that multiply and one that does not
constexpr int kMultiplyingRegisters = 232, kOtherRegisters = 40;
static_assert((kMomentGroups * kMultiplyingRegisters + kOtherRegisters) * kGroupThreads <= 65536);

template <class Key, int kColumns, int kStages>
__global__ void __launch_bounds__(kMomentThreads, 1)
    moment_sm90a_kernel(const __grid_constant__ ptx::TensorMap keys, const __grid_constant__ MomentShape<Key> shape) {
    if constexpr (ptx::kHasWgmma) {
        auto& shared = shared_as<MomentShared<kColumns, kStages>>();
        if (threadIdx.x == 0) {
            begin_ring(shared);
        }
        __syncthreads();
        if (threadIdx.x < kMultipliers) {
            ptx::take_registers<kMultiplyingRegisters>();
            multiply_tiles<Key>(shape, shared);
            return;
        }
        ptx::keep_registers<kOtherRegisters>();
        if (threadIdx.x == kMultipliers) {
            bring_keys(keys, shape, shared);
        } else if (threadIdx.x / kLanes == kMultipliers / kLanes + 1) {
            clear_keys(shape, shared);
        }
    } else {
        add_tiles_plainly<Key, kColumns>(shape);
    }
}

BoxedMatrix key_matrix(const MomentKeys& keys) {
    return {keys.data, keys.n_tokens, keys.key_dim, keys.row_stride};
}

template <class Key, int kColumns, int kStages>
void accumulate_typed(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                      cudaStream_t stream) {
    const auto key_dim = static_cast<int>(keys.key_dim);
    const int n_tiles = n_tiles_of<kColumns>(key_dim);
    const MomentShape<Key> shape = {static_cast<const Key*>(keys.data),
                                    keys.row_stride,
                                    counts,
                                    total,
                                    total_stride,
                                    allows_sixteen_bytes(total, total_stride, sizeof(double)),
                                    static_cast<int>(keys.n_tokens),
                                    static_cast<int>((keys.n_tokens + kStageTokens - 1) / kStageTokens),
                                    key_dim,
                                    n_tiles};
    const auto n_blocks = static_cast<unsigned>(std::min(n_tiles, n_multiprocessors()));
    launch("accumulate_moment_sm90a", moment_sm90a_kernel<Key, kColumns, kStages>,
           {dim3(n_blocks), dim3(kMomentThreads), sizeof(MomentShared<kColumns, kStages>), stream, true},
           make_tensor_map(key_matrix(keys), kStageTokens), shape);
}

template <class Key>
void accumulate_by_tile(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                        int tile_columns, cudaStream_t stream) {
    // 192 and 200 of the 227 KiB that a block may have
    if (tile_columns == kWideMomentTile) {
        return accumulate_typed<Key, kWideMomentTile, 5>(keys, counts, total, total_stride, stream);
    }
    accumulate_typed<Key, kNarrowMomentTile, 6>(keys, counts, total, total_stride, stream);
}

}  // namespace

bool can_accumulate_by_wgmma(const MomentKeys& keys) {
    const bool is_half = keys.dtype == DType::kBFloat16 || keys.dtype == DType::kFloat16;
    // tokens are counted by ints, a stage ahead
    constexpr std::int64_t kMostTokens = (std::int64_t{1} << 31) - 2 * kStageTokens;
    return is_half && keys.key_dim <= kWidestMoment && keys.n_tokens < kMostTokens && has_tensor_map(key_matrix(keys));
}

void accumulate_moment_by_wgmma(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                                int tile_columns, void* stream) {
    REP_FAST_CHECK(tile_columns == kNarrowMomentTile || tile_columns == kWideMomentTile,
                   "a tile has 128 or 192 columns, got " << tile_columns);
    if (keys.n_tokens == 0 || keys.key_dim == 0) {
        return;
    }
    REP_FAST_CHECK(can_accumulate_by_wgmma(keys),
                   "the copy engine takes bfloat16 or float16 keys whose rows begin at multiples of 16 bytes, got "
                       << dtype_name(keys.dtype) << " rows " << keys.row_stride << " apart; use accumulate_moment");
    const auto on = static_cast<cudaStream_t>(stream);
    if (keys.dtype == DType::kBFloat16) {
        return accumulate_by_tile<BFloat16>(keys, counts, total, total_stride, tile_columns, on);
    }
    accumulate_by_tile<Float16>(keys, counts, total, total_stride, tile_columns, on);
}

}  // namespace rep_fast::cuda
