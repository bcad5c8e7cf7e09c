// The fused scan: a product by wgmma whose epilogue compares and forgets (sm_90a alone; elsewhere an empty kernel).
//
// A block is persistent and works on tiles of 128 keys × kQueries queries, the query tiles of the same keys one after
// another, so that blocks which run at a time read a key from memory once and from L2 else. A warp of its own asks the
// copy engine for 128 bytes of each row of keys and queries at a time, kStages ahead; two warpgroups multiply 64 keys
// each. Bfloat16 keys are multiplied as they are; while the tensor cores work on a stage, the squares of its keys are
// summed from shared memory. Keys in whole steps come from quantised_rows.cu, chunk by chunk: a row's step is known
// when all of the row has been seen, which no tile does. Then every sum, with its margins, meets the limit of its
// query; what is left goes to the query's list of candidates, in any order, and a block per query scores the list
// exactly. The order of a list changes no hit: hits are ordered by score and id.
//
// Bytes: 2·n·M of keys, 2·P·S·M of queries from L2 per 128 keys, half of either in whole steps; operations 2·P·n·S·M.
// Limit: tensor cores from S ≈ 200 on; in whole steps, for which 2·n·M bytes are read, n·M written and n·M read again
// unless L2 keeps them, from S ≈ 600 on, and there L2, which would have to give 9 TB/s. Registers by ptxas 13.0: 117 at
// 128 queries and 168 at 256, in whole steps 96 and 164, of the 168 that it gives 288 threads, which it counts as three
// warpgroups; nothing is spilled; one block per multiprocessor. Not run or measured yet on a device: stages, tile and
// order of tiles are choices by arithmetic.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <limits>

#include "core/error.h"
#include "cuda/exact_hits.cuh"
#include "cuda/fused_scan.h"
#include "cuda/fused_scan_sm90a.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"

namespace rep_fast::cuda {
namespace {

constexpr std::int32_t kMoreThanAnyList = std::numeric_limits<std::int32_t>::max();

template <class Product, int kQueries, int kStages>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_scan_kernel(const __grid_constant__ ptx::TensorMap keys, const __grid_constant__ ptx::TensorMap queries,
                      const __grid_constant__ FusedShape shape) {
    if constexpr (ptx::kHasWgmma) {
        auto& shared = shared_as<FusedShared<kQueries, kStages>>();
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < kStages; ++stage) {
                ptx::mbarrier_init(&shared.landed[stage], 1);
                ptx::mbarrier_init(&shared.released[stage], kMultiplyingWarps);
            }
            ptx::fence_mbarrier_init();
        }
        __syncthreads();
        if (threadIdx.x >= kMultiplyingThreads) {
            if (threadIdx.x == kMultiplyingThreads) {
                bring_tiles<Product::kColumns>(keys, queries, shape, shared);
            }
            return;
        }
        Turn<kStages> turn;
        for (std::int64_t tile = blockIdx.x; tile < shape.n_tiles; tile += gridDim.x) {
            typename Product::Sum sums[kQueries / 2];
            float squares[2] = {0.0f, 0.0f};
            multiply_tile(shape, shared, turn, sums, squares);
            append_survivors<kQueries>(shape, tile, sums, squares);
        }
    }
}

// The limits of the chunk, and empty lists. Queries that are none and queries left out have the limit ∞.
__global__ void __launch_bounds__(kSelectionThreads)
    begin_chunk_kernel(Selection selection, const float* query_steps, FusedScratch scratch, std::int64_t n_padded) {
    const std::int64_t query = static_cast<std::int64_t>(blockIdx.x) * kSelectionThreads + threadIdx.x;
    if (query >= n_padded) {
        return;
    }
    QueryLimit limit = {0.0f, kFloatInfinity, kFloatInfinity, 0.0f};
    if (query < selection.n_queries) {
        const float margin = selection.query_margins[query];
        if (margin == margin) {
            const double floor =
                floor_of(selection, selection.scores + query * selection.k, selection.ids + query * selection.k, query);
            limit.margin = margin;
            limit.limit = __double2float_rd(floor);
            limit.largest_norm = margin > 0.0f ? kLargestError / margin : kFloatInfinity;
            limit.step = query_steps != nullptr ? query_steps[query] : 0.0f;
        }
        // without a product nothing is known of any key
        scratch.counts[query] = ptx::kHasWgmma ? 0 : kMoreThanAnyList;
    }
    scratch.limits[query] = limit;
}

// One block scores the candidates of one query exactly, or every key where they were too many for the list.
template <class Key>
__global__ void __launch_bounds__(kSelectionThreads)
    settle_candidates_kernel(Selection selection, FusedScratch scratch) {
    auto& shared = shared_as<SelectionShared>();
    auto* scores = reinterpret_cast<double*>(&shared + 1);
    auto* ids = reinterpret_cast<std::int64_t*>(scores + selection.k);
    const std::int64_t query = blockIdx.x;
    const std::int64_t n_listed = scratch.counts[query];
    const float margin = selection.query_margins[query];
    if (n_listed == 0 || margin != margin) {
        return;  // the whole block leaves
    }
    load_hits(selection, shared, scores, ids, query);
    const bool is_whole = n_listed <= scratch.capacity;
    const std::int64_t n_rows = is_whole ? n_listed : selection.keys.n_keys;
    for (std::int64_t base = 0; base < n_rows; base += kCandidates) {
        const std::int64_t left = n_rows - base;
        const int n = left < kCandidates ? static_cast<int>(left) : kCandidates;
        for (int i = static_cast<int>(threadIdx.x); i < n; i += kSelectionThreads) {
            shared.candidates[i].row = is_whole ? scratch.candidates[query * scratch.capacity + base + i]
                                                : static_cast<std::int32_t>(base + i);
        }
        if (threadIdx.x == 0) {
            shared.n_candidates = n;
        }
        __syncthreads();
        settle<Key>(selection, shared, scores, ids, query);
    }
    store_hits(selection, scores, ids, query);
}

bool is_in_steps(const FusedScan& scan) {
    return scan.steps.values != nullptr;
}

std::int64_t multiplied_width(const FusedScan& scan) {
    return is_in_steps(scan) ? scan.steps.padded_width : scan.selection.keys.key_dim;
}

BoxedMatrix key_matrix(const FusedScan& scan) {
    const KeyChunk& keys = scan.selection.keys;
    if (is_in_steps(scan)) {
        return {scan.steps.values, keys.n_keys, scan.steps.padded_width, scan.steps.padded_width, 1};
    }
    return {keys.data, keys.n_keys, keys.key_dim, keys.row_stride, 2};
}

BoxedMatrix query_matrix(const FusedScan& scan) {
    return {scan.factor, scan.n_parts * scan.selection.n_queries, multiplied_width(scan), scan.factor_stride,
            is_in_steps(scan) ? 1 : 2};
}

template <class Product, int kQueries, int kStages>
void multiply_chunk(const FusedScan& scan, cudaStream_t stream) {
    FusedShape shape;
    shape.selection = scan.selection;
    shape.steps = scan.steps;
    shape.counters = scan.counters;
    shape.scratch = scan.scratch;
    shape.n_parts = scan.n_parts;
    shape.n_steps = static_cast<int>((multiplied_width(scan) + Product::kColumns - 1) / Product::kColumns);
    shape.n_query_tiles = padded_queries(scan.selection.n_queries) / kQueries;
    shape.n_tiles = (scan.selection.keys.n_keys + kKeys - 1) / kKeys * shape.n_query_tiles;
    const auto n_blocks = static_cast<unsigned>(std::min<std::int64_t>(shape.n_tiles, n_multiprocessors()));
    launch("fused_scan", fused_scan_kernel<Product, kQueries, kStages>,
           {dim3(n_blocks), dim3(kFusedThreads), sizeof(FusedShared<kQueries, kStages>), stream, true},
           make_tensor_map(key_matrix(scan), kKeys), make_tensor_map(query_matrix(scan), kQueries), shape);
}

template <class Product>
void multiply_by_tile(const FusedScan& scan, cudaStream_t stream) {
    if (choose_fused_tile(scan.selection.n_queries).queries == 256) {
        multiply_chunk<Product, 256, 4>(scan, stream);
    } else {
        multiply_chunk<Product, 128, 6>(scan, stream);
    }
}

template <class Key>
void settle_typed(const FusedScan& scan, cudaStream_t stream) {
    const Selection& selection = scan.selection;
    launch("settle_candidates", settle_candidates_kernel<Key>,
           {dim3(static_cast<unsigned>(selection.n_queries)), dim3(kSelectionThreads), selection_bytes(selection.k),
            stream},
           selection, scan.scratch);
}

void settle_chunk(const FusedScan& scan, cudaStream_t stream) {
    switch (scan.selection.keys.dtype) {
        case DType::kFloat32:
            return settle_typed<float>(scan, stream);
        case DType::kBFloat16:
            return settle_typed<BFloat16>(scan, stream);
        case DType::kFloat16:
            return settle_typed<Float16>(scan, stream);
        default:
            REP_FAST_CHECK(false,
                           "keys must be float32, bfloat16 or float16, got " << dtype_name(scan.selection.keys.dtype));
    }
}

}  // namespace

FusedTile choose_fused_tile(std::int64_t n_queries) {
    // both take 192 of the 227 KiB that a block may have
    constexpr FusedTile kWide = {256, 4}, kNarrow = {128, 6};
    const auto padded = [n_queries](const FusedTile& tile) {
        return (n_queries + tile.queries - 1) / tile.queries * tile.queries;
    };
    return padded(kWide) <= padded(kNarrow) ? kWide : kNarrow;
}

std::int64_t padded_queries(std::int64_t n_queries) {
    const int unit = choose_fused_tile(n_queries).queries;
    return (n_queries + unit - 1) / unit * unit;
}

bool can_fuse(const FusedScan& scan) {
    const bool has_product = is_in_steps(scan) || scan.selection.keys.dtype == DType::kBFloat16;
    return has_product && has_tensor_map(key_matrix(scan)) && has_tensor_map(query_matrix(scan));
}

void scan_fused(const FusedScan& scan, void* stream) {
    const Selection& selection = scan.selection;
    if (selection.keys.n_keys == 0 || selection.n_queries == 0) {
        return;
    }
    REP_FAST_CHECK(can_fuse(scan),
                   "the fused scan takes keys and queries in whole steps, or bfloat16 ones, whose rows begin at "
                   "multiples of 16 bytes; use select_hits");
    REP_FAST_CHECK(!is_in_steps(scan) || scan.n_parts == 1,
                   "keys in whole steps are multiplied once, got " << scan.n_parts << " parts of the queries");
    const auto on = static_cast<cudaStream_t>(stream);
    selection_bytes(selection.k);  // before anything runs
    const std::int64_t n_padded = padded_queries(selection.n_queries);
    const auto n_blocks = static_cast<unsigned>((n_padded + kSelectionThreads - 1) / kSelectionThreads);
    launch("begin_chunk", begin_chunk_kernel, {dim3(n_blocks), dim3(kSelectionThreads), 0, on}, selection,
           scan.steps.query_steps, scan.scratch, n_padded);
    if (is_in_steps(scan)) {
        multiply_by_tile<Int8Product>(scan, on);
    } else {
        multiply_by_tile<BFloat16Product>(scan, on);
    }
    settle_chunk(scan, on);
}

}  // namespace rep_fast::cuda
