// Scans that the fused body takes, whatever it multiplies, and the way through them chunk by chunk.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "cuda/fused_scan.h"
#include "guarded.h"
#include "whole_number_scan.h"

inline std::int64_t in_eights(std::int64_t n) {
    return (n + 7) / 8 * 8;
}

// Its rows begin where the copy engine takes them.
struct FusedCase : Scan {
    std::int64_t capacity = 1000;
    bool with_rule = false;
    std::vector<std::int32_t> counts;  // of the last chunk

    FusedCase(std::int64_t keys_, std::int64_t queries_, std::int64_t dim, std::int64_t k_, unsigned seed)
        : Scan(keys_, queries_, dim, k_, seed, in_eights(dim) - dim + 8) {}

    [[nodiscard]] std::vector<bool> all_finite() const {
        return std::vector<bool>(static_cast<std::size_t>(n_keys), true);
    }
    [[nodiscard]] rep_fast::cuda::KeyChunk chunk(std::int64_t first, std::int64_t rows) const {
        return {&keys[static_cast<std::size_t>(first * stride)], rep_fast::DType::kBFloat16, rows, key_dim, stride};
    }
};

// The state after the first `n_keys` keys, by brute force.
inline Found state_after(const FusedCase& input, std::int64_t n_keys) {
    Found found;
    FusedCase front = input;
    front.n_keys = n_keys;
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        for (const Hit& hit : front.brute_force(query, input.with_rule, front.all_finite())) {
            found.scores.push_back(hit.score);
            found.ids.push_back(hit.id);
        }
    }
    return found;
}

// A chunk without the operands of its product.
inline rep_fast::cuda::FusedScan chunk_of(const FusedCase& input, std::int64_t first, std::int64_t rows, Found& found) {
    rep_fast::cuda::FusedScan scan;
    scan.selection.keys = input.chunk(first, rows);
    scan.selection.first_row = first;
    scan.selection.first_id = 1000;
    scan.selection.queries = input.queries.data();
    scan.selection.query_stride = input.key_dim;
    scan.selection.n_queries = input.n_queries;
    scan.selection.scores = found.scores.data();
    scan.selection.ids = found.ids.data();
    scan.selection.k = input.k;
    if (input.with_rule) {
        scan.selection.last_token = {input.tokens.data(),
                                     input.starts.data(),
                                     std::ssize(input.starts),
                                     input.last_tokens.data(),
                                     input.lookback.data(),
                                     std::ssize(input.lookback),
                                     input.window};
    }
    scan.counters = {nullptr, &found.n_nonfinite, &found.first_nonfinite};
    return scan;
}

// Scans in chunks of `chunk` keys what follows the first `n_before`; `give_operands(scan, first row)` does what the
// product of a chunk needs.
template <class GiveOperands>
Found scan_by(FusedCase& input, std::int64_t chunk, std::int64_t n_before, const std::vector<float>& margins,
              const GiveOperands& give_operands) {
    Found found = state_after(input, n_before);
    const std::vector<float> slacks(static_cast<std::size_t>(input.n_queries), 0.0f);
    Guarded<rep_fast::cuda::QueryLimit> limits(
        static_cast<std::size_t>(rep_fast::cuda::padded_queries(input.n_queries)));
    Guarded<std::int32_t> counts(static_cast<std::size_t>(input.n_queries));
    Guarded<std::int32_t> candidates(static_cast<std::size_t>(input.n_queries * input.capacity));
    for (std::int64_t first = n_before; first < input.n_keys; first += chunk) {
        auto one = chunk_of(input, first, std::min(chunk, input.n_keys - first), found);
        one.selection.query_margins = margins.data();
        one.selection.query_slacks = slacks.data();
        one.scratch = {limits.data(), counts.data(), candidates.data(), input.capacity};
        give_operands(one, first);
        rep_fast::cuda::scan_fused(one, nullptr);
    }
    input.counts.assign(counts.begin(), counts.end());
    return found;
}

inline bool same_bits(const Found& a, const Found& b) {
    return a.scores == b.scores && a.ids == b.ids && a.n_nonfinite == b.n_nonfinite &&
           a.first_nonfinite == b.first_nonfinite;
}
