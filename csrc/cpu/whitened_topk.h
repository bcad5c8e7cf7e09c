// Best k keys per whitened query by inner product: the collision scan, one block of a stream of keys at a time.
//
// score(i, j) = queries[i] · keys[j]. Exact on the stored numbers: a fast pass bounds every score, pairs that
// might enter the running top k are scored again in float64 in one fixed order, and the state keeps that float64. The
// result is the same for any thread count, block size and instruction set; equal scores keep the lower id.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "core/cpu_level.h"
#include "core/dtype.h"
#include "core/key_matrix.h"
#include "core/matrix_view.h"
#include "cpu/dither.h"

namespace rep_fast {

// How pairs are ruled out before the rest is scored in float64: not at all, by a float32 product, by one of bfloat16
// with the queries' high halves, or high + low, or by one of int8 with a random dither (dither.h).
enum class ScanPass : int { kFloat64 = 0, kFloat32 = 1, kBf16 = 2, kBf16Twice = 3, kInt8 = 4 };
inline constexpr std::array<const char*, 5> kScanPassNames = {"fp64", "fp32", "bf16", "bf16x2", "int8"};

// Why keys went through the pass they did.
enum class PassReason : int { kAskedFor = 0, kOnlyOne = 1, kFastest = 2, kWideMargin = 3, kGaveUp = 4 };
inline constexpr std::array<const char*, 5> kPassReasons = {
    "asked for by name", "the only pass for these keys and this processor", "fastest by the rates measured here",
    "int8 would let too many pairs through, by a sample", "int8 let too many pairs through"};

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
    std::optional<ScanPass> pass = std::nullopt;  // none: chosen by what the passes cost and let through
    DitherOptions dither = {};
};

// Running state, read and replaced: per query the best k so far, descending, ids −1 (score −∞) where there is none.
struct ScanState {
    MatrixView<double> scores;      // [n_queries, k]
    MatrixView<std::int64_t> ids;   // [n_queries, k]
    std::span<bool> query_dropped;  // n_queries; set where the query holds a NaN or infinity (its state is left alone)
};

class QueryPackings;

struct ScanReport {
    std::int64_t n_nonfinite_keys = 0;
    std::int64_t first_nonfinite_key = -1;                           // row number
    std::int64_t n_rescored = 0;                                     // pairs scored in float64
    std::array<std::int64_t, kScanPassNames.size()> pass_keys = {};  // keys that each pass went over
    std::array<std::int64_t, kPassReasons.size()> reason_keys = {};  // and why
};

// Throws Error when sizes do not fit together, or a pass is asked for by name where the keys or the level have none.
// Rows with a NaN or infinity are left out and counted.
//
// packings: of input.queries, kept from block to block; null packs them for this call.
ScanReport whitened_topk(const ScanInput& input, const ScanState& state, CpuLevel level, int n_threads,
                         QueryPackings* packings = nullptr);

}  // namespace rep_fast
