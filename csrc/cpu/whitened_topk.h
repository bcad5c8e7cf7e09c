// Best k keys per whitened query by inner product: the collision scan, one block of a stream of keys at a time.
//
// score(i, j) = queries[i] · keys[j]. Exact on the stored numbers: a fast pass bounds every score, pairs that
// might enter the running top k are scored again in float64 in one fixed order, and the state keeps that float64. The
// result is the same for any thread count, block size and instruction set; equal scores keep the lower id.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "core/dispatch.h"
#include "core/dtype.h"
#include "core/key_matrix.h"
#include "core/matrix_view.h"

namespace rep_fast {

// How pairs are ruled out before the rest is scored in float64; kAuto chooses by the bound on each pass's error.
enum class ScanPrecision { kAuto, kFloat64, kFloat32, kBf16, kBf16Twice };

// What ran: every pair in float64, or a float32 product, or one of bfloat16 with the queries' high halves, or high +
// low.
enum class ScanPass : int { kFloat64 = 0, kFloat32 = 1, kBf16 = 2, kBf16Twice = 3 };

// Position p is excluded for query i if last_tokens[i] occurs at p, p−1, …, p−window inside p's sequence.
struct LastTokenRule {
    std::span<const std::int64_t> token_ids = {};        // one per key; empty: the rule is off
    std::span<const std::int64_t> sequence_starts = {};  // ascending row numbers, the first is 0
    std::span<const std::int64_t> last_tokens = {};      // one per query
    std::span<const std::int64_t> lookback = {};         // tokens of row 0's sequence that precede row 0, oldest first
    std::int64_t window = 0;
};

// Row p is excluded for the queries subjects[indptr[p]] … subjects[indptr[p + 1] − 1].
struct PairRule {
    std::span<const std::int64_t> indptr = {};  // n_keys + 1; empty: the rule is off
    std::span<const std::int64_t> subjects = {};
};

struct ScanInput {
    KeyMatrix keys;                   // [n_keys, key_dim]
    MatrixView<const float> queries;  // [n_queries, key_dim]
    std::int64_t first_id = 0;        // id of key row j is first_id + j
    LastTokenRule last_token = {};
    PairRule pairs = {};
    ScanPrecision precision = ScanPrecision::kAuto;
};

// Running state, read and replaced: per query the best k so far, descending, ids −1 (score −∞) where there is none.
struct ScanState {
    MatrixView<double> scores;      // [n_queries, k]
    MatrixView<std::int64_t> ids;   // [n_queries, k]
    std::span<bool> query_dropped;  // n_queries; set where the query holds a NaN or infinity (its state is left alone)
};

struct ScanReport {
    std::int64_t n_nonfinite_keys = 0;
    std::int64_t first_nonfinite_key = -1;  // row number
    std::int64_t n_rescored = 0;            // pairs scored in float64
    ScanPass pass = ScanPass::kFloat64;
};

// Throws Error when sizes do not fit together, or a bfloat16 pass is asked for by name where the keys or the level have
// none. Rows with a NaN or infinity are left out and counted.
ScanReport whitened_topk(const ScanInput& input, const ScanState& state, CpuLevel level, int n_threads);

// Queries are packed in panels, the last one padded with zeros: [panel][key_dim][kPanelQueries] float32, or as
// `Bf16Panels` says.
inline constexpr std::int64_t kPanelQueries = 16;
// Keys are widened to float32 and multiplied in tiles of this many rows.
inline constexpr std::int64_t kTileKeys = 6;
// Depth of one k-block: the panels of a register tile stay near (16 KiB in AVX2's, 64 KiB at most), and chains of
// additions in float32 are no longer than it, or twice it with high and low halves.
inline constexpr std::int64_t kBlockDepth = 256;
// Row stride of a widened block: off the power of two, so that the rows of a tile do not share cache sets.
inline constexpr std::int64_t kWidenedStride = kBlockDepth + 16;
// The float64 score adds product j into lane j mod kExactLanes, then folds the lanes in halves: one order everywhere.
inline constexpr std::int64_t kExactLanes = 16;

// size n: widens keys[0..n) to float32 and returns Σ keys², in float64: infinite or NaN exactly when a key is.
template <class T>
using WidenKeys = double (*)(const T* keys, std::int64_t n, float* widened);
// size n: the float64 score of one pair. Products of two float32 are exact in float64, so only the order matters.
template <class T>
using ExactScore = double (*)(const T* key, const float* query, std::int64_t n);

template <class T>
struct KeyKernels {
    WidenKeys<T> widen;
    ExactScore<T> exact_score;
};

struct Float32Products {
    // scores[n_tiles · kTileKeys, n_panels · kPanelQueries] (+)= keys[·, depth] · queries[depth, ·].
    // keys: row stride kWidenedStride; panel p starts at panels + p · panel_stride; scores: row stride score_stride;
    // `first` overwrites instead of adding.
    void (*multiply)(const float* keys, std::int64_t n_tiles, const float* panels, std::int64_t n_panels,
                     std::int64_t panel_stride, std::int64_t depth, float* scores, std::int64_t score_stride,
                     bool first);
    // Writes every q in [0, n) for which NOT (scores[q] + key_norm · margins[q] + underflow < thresholds[q]),
    // ascending, and returns how many; NaN survives. n is a multiple of kPanelQueries.
    std::int64_t (*select)(const float* scores, const float* margins, const float* thresholds, float key_norm,
                           float underflow, std::int64_t n, std::int32_t* survivors);
};

// One k-block of rows as they lie in the stream.
struct Bf16Keys {
    const BFloat16* first;
    std::int64_t stride;
    std::int64_t n_rows;
    std::int64_t depth;
    std::int64_t n_after;  // elements of each row behind the block
};

// Queries as bfloat16: panel p holds pairs of depth, [pair][kPanelQueries], at p · stride; the low halves likewise, or
// null. An odd depth ends with a pair whose second element is zero.
struct Bf16Panels {
    const std::uint32_t* high;
    const std::uint32_t* low;
    std::int64_t stride;
};

struct Bf16Products {
    // As Float32Products::multiply, for n_rows rounded up to kTileKeys: products of bfloat16 are exact, every addition
    // rounds to float32 and flushes subnormal operands and results.
    void (*multiply)(const Bf16Keys& keys, const Bf16Panels& panels, std::int64_t n_panels, float* scores,
                     std::int64_t score_stride, bool first);
    // Σ k² with the same additions, at most n/16 + 8 in a chain; not finite if a key is not.
    float (*square)(const BFloat16* keys, std::int64_t n);
};

struct WhitenedTopkKernels {
    KeyKernels<float> f32;
    KeyKernels<BFloat16> bf16;
    KeyKernels<Float16> f16;
    Float32Products float32;
    const Bf16Products* bf16_products = nullptr;  // where the level has them
};

// How many of n panels a register tile takes: 4 or 3 without a rest of 1 from 6 on, whose few sums would wait for each
// other.
[[gnu::always_inline]] inline std::int64_t panels_at_once(std::int64_t n) {
    return n % 4 == 0 ? 4 : (n >= 3 ? 3 : n);
}

const DispatchTable<WhitenedTopkKernels>& whitened_topk_table();

namespace portable {
extern const WhitenedTopkKernels kWhitenedTopk;
}
namespace avx2 {
extern const WhitenedTopkKernels kWhitenedTopk;
}
namespace avx512 {
extern const Float32Products kFloat32Products;
}
namespace avx512_bf16 {
extern const Bf16Products kBf16Products;
}

}  // namespace rep_fast
