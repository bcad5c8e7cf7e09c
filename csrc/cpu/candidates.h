// Pairs that a fast pass could not rule out, waiting to be scored in float64.
//
// They are scored query by query, the highest bound first: the first few raise the query's threshold above the bounds
// of most others, which then need no score. At the start of a stream, where nothing is ruled out yet, that leaves about
// k pairs per query of a block instead of the k·(1 + ln(n/k)) records of a random order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace rep_fast {

class Candidates {
  public:
    // n_queries: numbers of queries are below.
    explicit Candidates(std::int64_t n_queries) : ends_(static_cast<std::size_t>(n_queries) + 1) {
        waiting_.reserve(kCapacity);
    }

    // Room for so many more without growing.
    std::int64_t room() const { return kCapacity - std::ssize(waiting_); }

    // bound: not below the pair's score; NaN is taken for infinity.
    void add(std::int32_t query, std::int32_t row, float bound) {
        waiting_.push_back({query, row, std::isnan(bound) ? std::numeric_limits<float>::infinity() : bound});
    }

    // Empties itself into visit(query, row, bound), whose answer says whether the query's pairs of lower bounds are
    // still of interest.
    template <class Visit>
    void drain(const Visit& visit) {
        sort_by_query();
        std::int64_t begin = 0;
        for (std::size_t query = 0; query + 1 < ends_.size(); ++query) {
            const std::int64_t end = ends_[query];
            auto* const first = sorted_.data() + begin;
            auto* last = sorted_.data() + end;
            std::make_heap(first, last, has_lower_bound);
            while (first != last && visit(first->query, first->row, first->bound)) {
                std::pop_heap(first, last, has_lower_bound);
                --last;
            }
            begin = end;
        }
        waiting_.clear();
    }

  private:
    static constexpr std::int64_t kCapacity = 1 << 14;  // with the sorted copy 384 KiB

    struct Pair {
        std::int32_t query;
        std::int32_t row;
        float bound;
    };

    static bool has_lower_bound(const Pair& a, const Pair& b) { return a.bound < b.bound; }

    // By counting; afterwards ends_[q] is where query q ends.
    void sort_by_query() {
        std::fill(ends_.begin(), ends_.end(), 0);
        for (const Pair& pair : waiting_) {
            ++ends_[static_cast<std::size_t>(pair.query) + 1];
        }
        for (std::size_t query = 1; query < ends_.size(); ++query) {
            ends_[query] += ends_[query - 1];
        }
        sorted_.resize(waiting_.size());
        for (const Pair& pair : waiting_) {
            sorted_[static_cast<std::size_t>(ends_[static_cast<std::size_t>(pair.query)]++)] = pair;
        }
    }

    std::vector<Pair> waiting_;
    std::vector<Pair> sorted_;
    std::vector<std::int64_t> ends_;
};

}  // namespace rep_fast
