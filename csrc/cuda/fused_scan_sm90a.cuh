// What the blocks of the fused scan do on sm_90a: a ring of stages that the copy engine fills, two warpgroups that
// multiply, and an epilogue that compares and forgets. For fused_scan.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/eight.cuh"
#include "cuda/exact_hits.cuh"
#include "cuda/fused_scan.h"
#include "cuda/number.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/ptx/wgmma_int8.cuh"
#include "cuda/stage_ring.cuh"
#include "cuda/warp_sum.cuh"

namespace rep_fast::cuda {

inline constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();
inline constexpr int kKeys = kFusedTileKeys;  // two warpgroups of wgmma's 64 rows
inline constexpr int kMultiplyingThreads = kKeys / kGroupRows * kGroupThreads;
inline constexpr int kMultiplyingWarps = kMultiplyingThreads / kLanes;
inline constexpr int kFusedThreads = kMultiplyingThreads + kLanes;

// What the tensor cores multiply: bfloat16 to float32 sums, or whole steps to int32 sums, which are exact.
template <class Element_, class Sum_>
struct Product {
    using Element = Element_;
    using Sum = Sum_;
    static constexpr int kColumns = ptx::kBoxColumns<Element>;  // of a stage
};
using BFloat16Product = Product<BFloat16, float>;
using Int8Product = Product<std::int8_t, std::int32_t>;

struct FusedShape {
    Selection selection;
    KeySteps steps;  // where whole steps are multiplied
    KeyNorms counters;
    FusedScratch scratch;
    int n_parts;
    int n_steps;  // stages of one part
    std::int64_t n_query_tiles;
    std::int64_t n_tiles;
};

template <int kQueries, int kStages>
struct FusedShared {
    // the swizzle is one of addresses, and repeats every 1024 bytes
    alignas(1024) unsigned char keys[kStages][kKeys * ptx::kBoxRowBytes];
    unsigned char queries[kStages][kQueries * ptx::kBoxRowBytes];
    std::uint64_t landed[kStages];
    std::uint64_t released[kStages];
    static_assert(kQueries % 8 == 0 && kQueries <= 256, "wgmma's columns, and the rows of a box");
    static_assert(kKeys * ptx::kBoxRowBytes % 1024 == 0, "the queries begin where a swizzled box may");
};

// One thread keeps the ring full.
template <int kColumns, int kQueries, int kStages>
__device__ inline void bring_tiles(const ptx::TensorMap& keys, const ptx::TensorMap& queries, const FusedShape& shape,
                                   FusedShared<kQueries, kStages>& shared) {
    Turn<kStages> turn;
    for (std::int64_t tile = blockIdx.x; tile < shape.n_tiles; tile += gridDim.x) {
        const auto first_key = static_cast<int>(tile / shape.n_query_tiles * kKeys);
        const auto first_query = static_cast<int>(tile % shape.n_query_tiles * kQueries);
        // what rounding left of the queries comes first: then the sums are small while it is added, and the error that
        // both parts' additions make stays within what the margins hold for one
        for (int part = shape.n_parts - 1; part >= 0; --part) {
            const int row = first_query + part * static_cast<int>(shape.selection.n_queries);
            for (int step = 0; step < shape.n_steps; ++step) {
                wait_for(shared.released[turn.stage], turn.parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(&shared.landed[turn.stage], (kKeys + kQueries) * ptx::kBoxRowBytes);
                ptx::copy_box(shared.keys[turn.stage], &keys, &shared.landed[turn.stage], step * kColumns, first_key);
                ptx::copy_box(shared.queries[turn.stage], &queries, &shared.landed[turn.stage], step * kColumns, row);
                turn.advance();
            }
        }
    }
}

__device__ inline void multiply(float (&sums)[64], std::uint64_t keys, std::uint64_t queries, bool accumulates) {
    ptx::wgmma_m64n128k16(sums, keys, queries, accumulates);
}
__device__ inline void multiply(float (&sums)[128], std::uint64_t keys, std::uint64_t queries, bool accumulates) {
    ptx::wgmma_m64n256k16(sums, keys, queries, accumulates);
}
__device__ inline void multiply(std::int32_t (&sums)[64], std::uint64_t keys, std::uint64_t queries, bool accumulates) {
    ptx::wgmma_m64n128k32(sums, keys, queries, accumulates);
}
__device__ inline void multiply(std::int32_t (&sums)[128], std::uint64_t keys, std::uint64_t queries,
                                bool accumulates) {
    ptx::wgmma_m64n256k32(sums, keys, queries, accumulates);
}

// Adds the squares of a stage's 64 columns to those of the two keys this thread holds sums of; its three neighbours
// have the same keys and take other columns. Which ones does not matter; through the swizzle no bank is met twice.
__device__ inline void add_squares(const unsigned char* group_keys, float (&squares)[2]) {
    const unsigned warp = threadIdx.x % kGroupThreads / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
    for (unsigned half = 0; half < 2; ++half) {
        const unsigned row = 16 * warp + 8 * half + lane / 4;
#pragma unroll
        for (unsigned piece = 0; piece < 2; ++piece) {
            const std::uint32_t place = ptx::swizzled(row * ptx::kBoxRowBytes + (2 * (lane % 4) + piece) * 16);
            const Eight<BFloat16> eight = load_eight(reinterpret_cast<const BFloat16*>(group_keys + place));
#pragma unroll
            for (int i = 0; i < kEight; ++i) {
                squares[half] = __fmaf_rn(eight[i], eight[i], squares[half]);
            }
        }
    }
}

// The sums of one tile and, of bfloat16 keys, their squares.
template <class Sum, int kQueries, int kStages>
__device__ inline void multiply_tile(const FusedShape& shape, FusedShared<kQueries, kStages>& shared,
                                     Turn<kStages>& turn, Sum (&sums)[kQueries / 2], float (&squares)[2]) {
    const unsigned group_begin = threadIdx.x / kGroupThreads * kGroupRows * ptx::kBoxRowBytes;
    const int n_steps = shape.n_parts * shape.n_steps, first_measured = n_steps - shape.n_steps;
    int before = -1;  // the stage whose products may still be under way
    for (int step = 0; step < n_steps; ++step) {
        wait_for(shared.landed[turn.stage], turn.parity);
        const unsigned char* const group_keys = shared.keys[turn.stage] + group_begin;
        const std::uint32_t keys = ptx::shared_address(group_keys);
        const std::uint32_t queries = ptx::shared_address(shared.queries[turn.stage]);
        ptx::wgmma_fence();
#pragma unroll
        for (std::uint32_t bytes = 0; bytes < ptx::kBoxRowBytes; bytes += ptx::kProductBytes) {
            multiply(sums, ptx::matrix_at(keys + bytes), ptx::matrix_at(queries + bytes), step > 0 || bytes > 0);
        }
        ptx::wgmma_commit();
        if constexpr (std::is_same_v<Sum, float>) {
            if (step >= first_measured) {
                add_squares(group_keys, squares);
            }
        }
        ptx::wgmma_wait<1>(sums);
        if (before >= 0) {
            release(shared.released[before]);
        }
        before = turn.stage;
        turn.advance();
    }
    ptx::wgmma_wait<0>(sums);
    release(shared.released[before]);
}

// Not below ‖k‖. The squares were added in float32, each addition exact to 2⁻²⁴ or, next to zero, to 2⁻¹⁵⁰.
__device__ inline float norm_above(double square, std::int64_t key_dim) {
    const auto n = static_cast<double>(key_dim);
    return static_cast<float>(sqrt((square + n * 0x1p-149) * (1.0 + (n + 16.0) * 0x1p-24)) * (1.0 + 0x1p-22));
}

// The same where the float32 sum overflowed; infinite exactly if the row is not finite.
__device__ inline double square_in_double(const Selection& selection, std::int64_t row) {
    const BFloat16* key = static_cast<const BFloat16*>(selection.keys.data) + row * selection.keys.row_stride;
    double square = 0.0;
    for (std::int64_t j = 0; j < selection.keys.key_dim; ++j) {
        const double value = static_cast<double>(widened(key[j]));
        square += value * value;
    }
    return square < kInfinity ? square : kInfinity;
}

// A key this thread holds sums of: whether it takes part, being in the chunk and finite, and what bounds its errors.
template <class Sum>
struct KeyOfThread;
template <>
struct KeyOfThread<float> {
    std::int64_t row = 0;
    bool is_there = false;
    float norm = 0.0f;
};
template <>
struct KeyOfThread<std::int32_t> {
    std::int64_t row = 0;
    bool is_there = false;
    float step = 0.0f;
    float margin = 0.0f;
};

// `square`: of its norm, as summed from the stages. `counts`: this thread counts it if it is not finite.
__device__ inline void look_at(const FusedShape& shape, float square, bool counts, KeyOfThread<float>& key) {
    auto wide = static_cast<double>(square);
    if (key.is_there && !(square < kFloatInfinity)) {
        wide = square_in_double(shape.selection, key.row);
        key.is_there = wide < kInfinity;
        if (!key.is_there && counts) {
            atomicAdd(reinterpret_cast<unsigned long long*>(shape.counters.n_nonfinite), 1ull);
            atomicMin(reinterpret_cast<long long*>(shape.counters.first_nonfinite),
                      static_cast<long long>(shape.selection.first_row + key.row));
        }
    }
    key.norm = norm_above(wide, shape.selection.keys.key_dim);
}

// Whoever quantised the rows has counted those that are not finite, and left them a NaN.
__device__ inline void look_at(const FusedShape& shape, float, bool, KeyOfThread<std::int32_t>& key) {
    if (key.is_there) {
        key.step = shape.steps.steps[key.row];
        key.margin = shape.steps.margins[key.row];
        key.is_there = key.margin == key.margin;
    }
}

// Whether the pair's score, in its favour, reaches the limit: upwards in every rounding; a NaN does.
__device__ inline bool may_reach(float sum, const KeyOfThread<float>& key, const QueryLimit& query) {
    return !(__fmaf_ru(key.norm, query.margin, sum) < query.limit && key.norm < query.largest_norm);
}
__device__ inline bool may_reach(std::int32_t sum, const KeyOfThread<std::int32_t>& key, const QueryLimit& query) {
    const float in_key_steps = __fmaf_ru(query.step, __int2float_ru(sum), query.margin);
    return !(__fmaf_ru(key.step, in_key_steps, __fmul_ru(query.step, key.margin)) < query.limit);
}

// No store of this kernel changes them, so that loads may run ahead.
__device__ inline QueryLimit load_limit(const FusedScratch& scratch, std::int64_t query) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(scratch.limits + query));
    return {__uint_as_float(words.x), __uint_as_float(words.y), __uint_as_float(words.z), __uint_as_float(words.w)};
}

// Rare. The limit of a query that is none, or left out, is infinite.
__device__ inline void append(const FusedScratch& scratch, const QueryLimit& limit, std::int64_t row,
                              std::int64_t query) {
    if (limit.limit == kFloatInfinity) {
        return;
    }
    const std::int32_t place = atomicAdd(&scratch.counts[query], std::int32_t{1});
    if (place < scratch.capacity) {
        scratch.candidates[query * scratch.capacity + place] = static_cast<std::int32_t>(row);
    }
}

// Writes down the pairs of the tile that may belong among the hits.
template <int kQueries, class Sum>
__device__ inline void append_survivors(const FusedShape& shape, std::int64_t tile, const Sum (&sums)[kQueries / 2],
                                        float (&squares)[2]) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const std::int64_t first_row =
        tile / shape.n_query_tiles * kKeys + static_cast<std::int64_t>(threadIdx.x) / kLanes * 16 + lane / 4;
    const std::int64_t first_query = tile % shape.n_query_tiles * kQueries + 2 * (lane % 4);
    const bool counts = lane % 4 == 0 && tile % shape.n_query_tiles == 0;
    KeyOfThread<Sum> own[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        own[half].row = first_row + 8 * half;
        own[half].is_there = own[half].row < shape.selection.keys.n_keys;
        squares[half] += __shfl_xor_sync(kAllLanes, squares[half], 1);
        squares[half] += __shfl_xor_sync(kAllLanes, squares[half], 2);
        look_at(shape, squares[half], counts, own[half]);
    }
#pragma unroll
    for (int column = 0; column < kQueries / 8; ++column) {
        const std::int64_t query = first_query + 8 * column;
        const QueryLimit limits[2] = {load_limit(shape.scratch, query), load_limit(shape.scratch, query + 1)};
        unsigned survivors = 0;
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            survivors |= may_reach(sums[4 * column + place], own[place / 2], limits[place % 2]) ? 1u << place : 0u;
        }
        if (survivors == 0) {
            continue;
        }
#pragma unroll
        for (int place = 0; place < 4; ++place) {
            if ((survivors >> place & 1u) != 0 && own[place / 2].is_there) {
                append(shape.scratch, limits[place % 2], own[place / 2].row, query + place % 2);
            }
        }
    }
}

}  // namespace rep_fast::cuda
