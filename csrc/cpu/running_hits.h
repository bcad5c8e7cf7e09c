// What whitened_topk may find and what it has found: pairs that are left out, the best k hits per query of the keys one
// worker saw, and their merge into the caller's state.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cpu/whitened_topk.h"

namespace rep_fast {

struct Hit {
    double score;
    std::int64_t id;
};

inline bool is_better(const Hit& a, const Hit& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// By the last-token rule or the pair rule.
bool is_excluded(const ScanInput& input, std::int64_t row, std::int64_t query);

class RunningHits {
  public:
    // n_padded: queries with those that fill the last panel.
    RunningHits(const ScanState& state, std::int64_t n_padded);

    bool would_take(std::int64_t query, const Hit& hit) const {
        const auto& hits = hits_[static_cast<std::size_t>(query)];
        return is_better(hit, floors_[static_cast<std::size_t>(query)]) &&
               (std::ssize(hits) < k_ || is_better(hit, hits.front()));
    }

    void take(std::int64_t query, const Hit& hit);

    // A pair that is not left out scores at least `lower` (not NaN): with k of them nothing below the least can enter.
    // Once per pair, which need not be taken as a hit.
    void expect(std::int64_t query, float lower);

    std::int64_t k() const { return k_; }

    // In no order.
    const std::vector<Hit>& of(std::int64_t query) const { return hits_[static_cast<std::size_t>(query)]; }
    // One per padded query: a score below it cannot enter. Infinite where there is no query to find hits for.
    const float* thresholds() const { return thresholds_.data(); }

  private:
    void update_threshold(std::int64_t query);

    std::int64_t k_;
    std::vector<Hit> floors_;
    std::vector<std::vector<Hit>> hits_;        // heaps whose front is the worst
    std::vector<std::vector<float>> expected_;  // the k largest lower bounds, likewise
    std::vector<float> thresholds_;
};

// Replaces the state by the best k of itself and everything found.
void merge_hits(std::span<const RunningHits> found, const ScanState& state);

}  // namespace rep_fast
