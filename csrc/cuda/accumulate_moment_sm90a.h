// Second moments of 16-bit keys on Hopper (sm_90a), by the copy engine and wgmma: a second body beside
// `accumulate_moment`, with the same contract. See accumulate_moment.h.
#pragma once

#include <cstdint>

#include "cuda/accumulate_moment.h"

namespace rep_fast::cuda {

// Columns of a tile of the moment; both have 128 rows.
inline constexpr int kNarrowMomentTile = 128;
inline constexpr int kWideMomentTile = 192;

// Whether the copy engine takes the keys as they lie in memory. Whether the device is one of sm_90 is the caller's to
// know; where the module holds no sm_90a code plain loops do the work, which is slow and right.
bool can_accumulate_by_wgmma(const MomentKeys& keys);

// As `accumulate_moment`; tokens that do not count are read but add nothing, and the bits depend on the tile, too.
// Throws Error for other tiles than the two above, and where !can_accumulate_by_wgmma(keys).
void accumulate_moment_by_wgmma(const MomentKeys& keys, const bool* counts, double* total, std::int64_t total_stride,
                                int tile_columns, void* stream);

}  // namespace rep_fast::cuda
