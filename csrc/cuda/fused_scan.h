// The collision scan on Hopper (sm_90a) with the selection inside the product: scores stay in registers, and only pairs
// that may belong among the hits are written down, to be scored exactly. A second body beside the library product and
// `select_hits`; same contract, same results. See whitened_topk.h.
#pragma once

#include <cstdint>

#include "cuda/whitened_topk.h"

namespace rep_fast::cuda {

// What the product knows of a query in one chunk: below `limit` a score with its margin is out, and keys of
// `largest_norm` or more make scores that may have overflowed. `step` is that of a query in whole steps.
struct alignas(16) QueryLimit {
    float margin;
    float limit;
    float largest_norm;
    float step;
};

// Memory between the kernels of one chunk, on the device.
struct FusedScratch {
    QueryLimit* limits = nullptr;        // [padded_queries(n_queries)]
    std::int32_t* counts = nullptr;      // [n_queries]
    std::int32_t* candidates = nullptr;  // [n_queries, capacity] rows of the chunk
    std::int64_t capacity = 0;           // a query with more candidates has every key scored exactly
};

// The chunk's keys as `quantise_rows` leaves them. Margins are those of Int8Sums.
struct KeySteps {
    const std::int8_t* values = nullptr;  // [n_keys, padded_width]; nullptr: the keys themselves are multiplied
    std::int64_t padded_width = 0;
    const float* steps = nullptr;        // [n_keys]
    const float* margins = nullptr;      // [n_keys]; NaN: the row is left out
    const float* query_steps = nullptr;  // [n_queries]
};

struct FusedScan {
    Selection selection;  // without approximate scores and norms; bfloat16 keys unless whole steps are multiplied
    KeySteps steps = {};
    // [n_parts · n_queries, key_dim] bfloat16: the queries rounded, then what that leaves of them, rounded. With two
    // parts the margins must hold what a product of key_dim additions costs, as with one. Or, beside keys in whole
    // steps, [n_queries, padded_width] int8 and one part.
    const void* factor = nullptr;
    std::int64_t factor_stride = 0;
    int n_parts = 1;
    KeyNorms counters;  // without norms; of keys in whole steps nobody counts here
    FusedScratch scratch;
};

inline constexpr int kFusedTileKeys = 128;

struct FusedTile {
    int queries = 0;
    int stages = 0;
};

// The tile that computes the fewest scores nobody asked for; of equals the wider, which reads less.
FusedTile choose_fused_tile(std::int64_t n_queries);

// n_queries rounded up to whole tiles.
std::int64_t padded_queries(std::int64_t n_queries);

// Whether the copy engine takes keys and factor as they lie in memory. Whether the device is one of sm_90 is the
// caller's to know; where the module holds no sm_90a code every key is scored exactly, which is slow and right.
bool can_fuse(const FusedScan& scan);

// Puts every key of the chunk that belongs there into the running top k, and counts keys that are not finite, as
// `measure_keys` and `select_hits` do. Throws Error for k > largest_k() and where !can_fuse(scan).
void scan_fused(const FusedScan& scan, void* stream);

}  // namespace rep_fast::cuda
