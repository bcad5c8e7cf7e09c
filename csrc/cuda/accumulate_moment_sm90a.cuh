// What the warps of a block do for a second moment on sm_90a: one brings keys, one clears those that do not count, two
// warpgroups multiply and add to the totals. For accumulate_moment_sm90a.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/moment_tiles.cuh"
#include "cuda/number.cuh"
#include "cuda/ptx/async_proxy.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma_transposed.cuh"
#include "cuda/ptx/wide_access.cuh"
#include "cuda/stage_ring.cuh"

namespace rep_fast::cuda {

inline constexpr int kMomentGroups = kTileRows / kGroupRows;
inline constexpr int kMultipliers = kMomentGroups * kGroupThreads;
inline constexpr int kMomentThreads = kMultipliers + kGroupThreads;

inline constexpr int kBoxWidth = 64;  // columns of a box
inline constexpr int kKeyBoxBytes = kStageTokens * ptx::kBoxRowBytes;
inline constexpr int kRowBoxes = kTileRows / kBoxWidth;
static_assert(kBoxWidth == kGroupRows, "a group multiplies the columns of one box");
static_assert(kBoxWidth * static_cast<int>(sizeof(std::uint16_t)) == ptx::kBoxRowBytes);

template <class Key>
struct MomentShape {
    const Key* keys;
    std::int64_t row_stride;
    const bool* counts;
    double* total;
    std::int64_t total_stride;
    bool total_in_pairs;  // two neighbours may be loaded at once
    int n_tokens, n_steps, key_dim, n_tiles;
};

template <int kColumns, int kStages>
struct MomentShared {
    static constexpr int kBoxes = kRowBoxes + kColumns / kBoxWidth;
    // the swizzle is one of addresses, and repeats every 1024 bytes; the rows' boxes come first
    alignas(1024) unsigned char boxes[kStages][kBoxes][kKeyBoxBytes];
    std::uint64_t landed[kStages];
    std::uint64_t ready[kStages];  // landed, and cleared of what does not count
    std::uint64_t released[kStages];
    static_assert(kColumns % kBoxWidth == 0);
};

template <int kColumns, int kStages>
__device__ inline void begin_ring(MomentShared<kColumns, kStages>& shared) {
    for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_init(&shared.landed[stage], 1);
        ptx::mbarrier_init(&shared.ready[stage], 1);
        ptx::mbarrier_init(&shared.released[stage], kMultipliers / kLanes);
    }
    ptx::fence_mbarrier_init();
}

// One thread keeps the ring full. On the diagonal some boxes come twice: 6 % of the tiles at M = 4096, 2 % at 11008.
template <class Key, int kColumns, int kStages>
__device__ inline void bring_keys(const ptx::TensorMap& keys, const MomentShape<Key>& shape,
                                  MomentShared<kColumns, kStages>& shared) {
    constexpr int kBoxes = MomentShared<kColumns, kStages>::kBoxes;
    Turn<kStages> turn;
    for (int tile = static_cast<int>(blockIdx.x); tile < shape.n_tiles; tile += static_cast<int>(gridDim.x)) {
        const TilePlace place = place_of_tile<kColumns>(shape.key_dim, tile);
        for (int step = 0; step < shape.n_steps; ++step) {
            wait_for(shared.released[turn.stage], turn.parity ^ 1);
            ptx::mbarrier_arrive_expect_tx(&shared.landed[turn.stage], kBoxes * kKeyBoxBytes);
            for (int box = 0; box < kBoxes; ++box) {
                const int column =
                    box < kRowBoxes ? place.row + box * kBoxWidth : place.column + (box - kRowBoxes) * kBoxWidth;
                ptx::copy_box(shared.boxes[turn.stage][box], &keys, &shared.landed[turn.stage], column,
                              step * kStageTokens);
            }
            turn.advance();
        }
    }
}

// Of the tokens of a stage, the two that a lane looks after.
struct LeftOut {
    bool early, late;
};

template <class Key>
__device__ inline LeftOut left_out_of(const MomentShape<Key>& shape, int step) {
    const int early = step * kStageTokens + static_cast<int>(threadIdx.x) % kLanes, late = early + kLanes;
    const bool* const counts = shape.counts;  // behind the last token there are zeros already
    return {counts != nullptr && early < shape.n_tokens && !counts[early],
            counts != nullptr && late < shape.n_tokens && !counts[late]};
}

// A warp writes zeros over the tokens from `first` on whose bits are set. A line of a box is one token's, so it does
// not matter where in the line the swizzle put what.
template <int kBoxes>
__device__ inline void clear_lines(unsigned char (&boxes)[kBoxes][kKeyBoxBytes], int first, unsigned tokens) {
    constexpr int kPieces = ptx::kBoxRowBytes / 16;
    for (; tokens != 0; tokens &= tokens - 1) {
        const int line = first + __ffs(static_cast<int>(tokens)) - 1;
        for (int piece = static_cast<int>(threadIdx.x) % kLanes; piece < kBoxes * kPieces; piece += kLanes) {
            ptx::store_16_shared(boxes[piece / kPieces] + line * ptx::kBoxRowBytes + piece % kPieces * 16,
                                 uint4{0, 0, 0, 0});
        }
    }
}

// One warp makes landed stages ready.
template <class Key, int kColumns, int kStages>
__device__ inline void clear_keys(const MomentShape<Key>& shape, MomentShared<kColumns, kStages>& shared) {
    Turn<kStages> turn;
    for (int tile = static_cast<int>(blockIdx.x); tile < shape.n_tiles; tile += static_cast<int>(gridDim.x)) {
        LeftOut ahead = left_out_of(shape, 0);
        for (int step = 0; step < shape.n_steps; ++step) {
            const unsigned early = __ballot_sync(kAllLanes, ahead.early), late = __ballot_sync(kAllLanes, ahead.late);
            ahead = left_out_of(shape, step + 1);  // comes from memory while this stage does
            wait_for(shared.landed[turn.stage], turn.parity);
            if ((early | late) != 0) {
                clear_lines(shared.boxes[turn.stage], 0, early);
                clear_lines(shared.boxes[turn.stage], kLanes, late);
                ptx::fence_async_proxy();
            }
            release(shared.ready[turn.stage]);
            turn.advance();
        }
    }
}

template <class Key>
__device__ inline void multiply(float (&products)[64], std::uint64_t rows, std::uint64_t columns, bool accumulates) {
    ptx::wgmma_m64n128k16_transposed(products, rows, columns, accumulates, Key{});
}
template <class Key>
__device__ inline void multiply(float (&products)[96], std::uint64_t rows, std::uint64_t columns, bool accumulates) {
    ptx::wgmma_m64n192k16_transposed(products, rows, columns, accumulates, Key{});
}

// Asks for the products of a stage. That the first of a chain does not accumulate is known when compiled: the registers
// are free for others between chains.
template <class Key, bool kIsFirst, int kColumns, int kStages>
__device__ inline void multiply_stage(const MomentShared<kColumns, kStages>& shared, int stage,
                                      float (&products)[kColumns / 2]) {
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
    const std::uint32_t rows = ptx::shared_address(shared.boxes[stage][group]);
    const std::uint32_t columns = ptx::shared_address(shared.boxes[stage][kRowBoxes]);
    ptx::wgmma_fence();
#pragma unroll
    for (std::uint32_t line = 0; line < kStageTokens; line += ptx::kTransposedDepth) {
        const std::uint32_t offset = line * ptx::kBoxRowBytes;
        multiply<Key>(products, ptx::transposed_matrix_at(rows + offset, kKeyBoxBytes),
                      ptx::transposed_matrix_at(columns + offset, kKeyBoxBytes), !kIsFirst || line > 0);
    }
    ptx::wgmma_commit();
}

// The products of the next n_steps stages, at least one.
template <class Key, int kColumns, int kStages>
__device__ inline void multiply_chain(MomentShared<kColumns, kStages>& shared, Turn<kStages>& turn, int n_steps,
                                      float (&products)[kColumns / 2]) {
    wait_for(shared.ready[turn.stage], turn.parity);
    multiply_stage<Key, true>(shared, turn.stage, products);
    for (int step = 1; step < n_steps; ++step) {
        const int before = turn.stage;  // its products may still be under way
        turn.advance();
        wait_for(shared.ready[turn.stage], turn.parity);
        multiply_stage<Key, false>(shared, turn.stage, products);
        ptx::wgmma_wait<1>(products);
        release(shared.released[before]);
    }
    ptx::wgmma_wait<0>(products);
    release(shared.released[turn.stage]);
    turn.advance();
}

// Adds two rows of this thread's sums where nothing is above the diagonal. Half a row is loaded before any of it is
// stored: otherwise each pair would wait for memory by itself. The barriers keep the compiler to that.
template <int kCount>
__device__ inline void add_whole_rows(double* entries, std::int64_t stride, const float (&sums)[kCount]) {
    constexpr int kPairs = kCount / 4, kAtOnce = kPairs / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        double* const row = entries + half * 8 * stride;
#pragma unroll
        for (int first = 0; first < kPairs; first += kAtOnce) {
            double2 found[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                found[i] = ptx::load_pair(row + 8 * (first + i));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int own = 4 * (first + i) + 2 * half;
                found[i].x += static_cast<double>(sums[own]);
                found[i].y += static_cast<double>(sums[own + 1]);
                ptx::store_pair(row + 8 * (first + i), found[i]);
            }
            __syncwarp();
        }
    }
}

// The same for one row of sums, of which only the first n_there columns are there.
template <int kHalf, int kCount>
__device__ inline void add_part_of_row(double* entries, int n_there, const float (&sums)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
        const int column = i / 2 * 8 + i % 2;
        if (column < n_there) {
            entries[column] += static_cast<double>(sums[i / 2 * 4 + 2 * kHalf + i % 2]);
        }
    }
}

// Adds this thread's sums to the totals, on and below the diagonal.
template <int kColumns, class Key>
__device__ inline void add_to_total(const MomentShape<Key>& shape, const TilePlace& place,
                                    const float (&sums)[kColumns / 2]) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
    const int row = place.row + warp * 16 + lane / 4, column = place.column + lane % 4 * 2;
    double* const entries = shape.total + std::int64_t{row} * shape.total_stride + column;
    const bool is_below = place.column + kColumns <= place.row + 1 && place.row + kTileRows <= shape.key_dim;
    if (is_below && shape.total_in_pairs) {
        add_whole_rows(entries, shape.total_stride, sums);
        return;
    }
    const int n_there = row + 1 - column;
    add_part_of_row<0>(entries, row < shape.key_dim ? n_there : 0, sums);
    add_part_of_row<1>(entries + 8 * shape.total_stride, row + 8 < shape.key_dim ? n_there + 8 : 0, sums);
}

// A warpgroup's 64 rows of every tile of the block.
template <class Key, int kColumns, int kStages>
__device__ inline void multiply_tiles(const MomentShape<Key>& shape, MomentShared<kColumns, kStages>& shared) {
    const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
    Turn<kStages> turn;
    for (int tile = static_cast<int>(blockIdx.x); tile < shape.n_tiles; tile += static_cast<int>(gridDim.x)) {
        const TilePlace place = place_of_tile<kColumns>(shape.key_dim, tile);
        int sum_end = steps_of_first_sum(tile, group);
        for (int step = 0; step < shape.n_steps; sum_end += kSumSteps) {
            const int end = sum_end < shape.n_steps ? sum_end : shape.n_steps;
            float products[kColumns / 2], sums[kColumns / 2] = {};
            while (step < end) {
                const int n_steps = end - step < kChainSteps ? end - step : kChainSteps;
                multiply_chain<Key>(shared, turn, n_steps, products);
#pragma unroll
                for (int i = 0; i < kColumns / 2; ++i) {
                    sums[i] += products[i];
                }
                step += n_steps;
            }
            add_to_total<kColumns>(shape, place, sums);
        }
    }
}

// The same by plain loops, for code that is not for sm_90a.
template <class Key, int kColumns>
__device__ inline void add_tiles_plainly(const MomentShape<Key>& shape) {
    for (int tile = static_cast<int>(blockIdx.x); tile < shape.n_tiles; tile += static_cast<int>(gridDim.x)) {
        const TilePlace place = place_of_tile<kColumns>(shape.key_dim, tile);
        for (int entry = static_cast<int>(threadIdx.x); entry < kTileRows * kColumns; entry += kMomentThreads) {
            const int row = place.row + entry / kColumns, column = place.column + entry % kColumns;
            if (row >= shape.key_dim || column > row) {
                continue;
            }
            double sum = 0.0;
            for (std::int64_t token = 0; token < shape.n_tokens; ++token) {
                if (shape.counts == nullptr || shape.counts[token]) {
                    const Key* const key = shape.keys + token * shape.row_stride;
                    sum += static_cast<double>(widened(key[row])) * static_cast<double>(widened(key[column]));
                }
            }
            shape.total[std::int64_t{row} * shape.total_stride + column] += sum;
        }
    }
}

}  // namespace rep_fast::cuda
