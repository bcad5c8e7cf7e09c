// Which tiles of a second moment there are, and in which order blocks take them. For accumulate_moment_sm90a.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/accumulate_moment.h"

namespace rep_fast::cuda {

inline constexpr int kTileRows = 128;
// Rows of tiles that are taken together, column by column: as many blocks as run at once then share few columns of
// keys, which stay in L2.
inline constexpr int kBandRows = 12;

// The widest keys whose tiles ints count.
inline constexpr int kWidestMoment = 1 << 22;

struct TilePlace {
    int row, column;  // of the first entry
};

// Tiles of a row of tiles that hold an entry on or below the diagonal.
template <int kColumns>
__host__ __device__ constexpr int n_tiles_of_row(int key_dim, int tile_row) {
    const int below = (tile_row + 1) * kTileRows;
    return ((below < key_dim ? below : key_dim) + kColumns - 1) / kColumns;
}

__host__ __device__ constexpr int n_tile_rows(int key_dim) {
    return (key_dim + kTileRows - 1) / kTileRows;
}

template <int kColumns>
constexpr int n_tiles_of(int key_dim) {
    int n = 0;
    for (int row = 0; row < n_tile_rows(key_dim); ++row) {
        n += n_tiles_of_row<kColumns>(key_dim, row);
    }
    return n;
}

// The tile of this number, 0 ≤ number < n_tiles_of(key_dim).
template <int kColumns>
__host__ __device__ constexpr TilePlace place_of_tile(int key_dim, int number) {
    const int n_rows = n_tile_rows(key_dim);
    for (int first = 0;; first += kBandRows) {
        const int height = n_rows - first < kBandRows ? n_rows - first : kBandRows;
        const int n_whole = n_tiles_of_row<kColumns>(key_dim, first);  // columns that all rows of the band have
        if (number < n_whole * height) {
            return {(first + number % height) * kTileRows, number / height * kColumns};
        }
        number -= n_whole * height;
        const int n_columns = n_tiles_of_row<kColumns>(key_dim, first + height - 1);
        for (int column = n_whole; column < n_columns; ++column) {
            const int top = column * kColumns / kTileRows, n_here = first + height - top;
            if (number < n_here) {
                return {(top + number) * kTileRows, column * kColumns};
            }
            number -= n_here;
        }
    }
}

inline constexpr int kStageTokens = 64;
inline constexpr int kChainSteps = static_cast<int>(kMomentChain) / kStageTokens;
inline constexpr int kSumSteps = static_cast<int>(kMomentTokens) / kStageTokens;
static_assert(kMomentChain % kStageTokens == 0 && kMomentTokens % kMomentChain == 0);

// Stages until a warpgroup adds the first sums of a tile to the totals; from then on it does so every kSumSteps. They
// differ from tile to tile and from group to group, so that the memory is asked for totals all the time instead of now
// and then by everybody, and while one group adds the other multiplies.
__host__ __device__ constexpr int steps_of_first_sum(int tile, int group) {
    constexpr int kPhases = kSumSteps / kChainSteps;
    const int phase = tile % (kPhases / 2) + group * (kPhases / 2);
    return kSumSteps - phase * kChainSteps;
}

}  // namespace rep_fast::cuda
