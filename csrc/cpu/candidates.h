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
    // n_queries: numbers of queries are below. Rows and queries fit 32 bits.
    explicit Candidates(std::int64_t n_queries)
        : capacity_(std::min(kCapacity, kPerQuery * n_queries)), ends_(static_cast<std::size_t>(n_queries) + 1) {
        waiting_.reserve(static_cast<std::size_t>(capacity_));
    }

    // Room for so many more without growing.
    std::int64_t room() const { return capacity_ - std::ssize(waiting_); }
    bool is_half_full() const { return 2 * std::ssize(waiting_) >= capacity_; }

    // bound: not below the pair's score; NaN is taken for infinity.
    void add(std::int64_t query, std::int64_t row, float bound) {
        waiting_.push_back({static_cast<std::int32_t>(row), static_cast<std::int32_t>(query),
                            std::isnan(bound) ? std::numeric_limits<float>::infinity() : bound});
    }

    // Empties itself into visit(query, row, bound), whose answer says whether the query's pairs of lower bounds are
    // still of interest.
    template <class Visit>
    void drain(const Visit& visit) {
        sort_by_query();
        const auto has_lower_bound = [&](std::int32_t a, std::int32_t b) { return at(a).bound < at(b).bound; };
        std::int64_t begin = 0;
        for (std::size_t query = 0; query + 1 < ends_.size(); ++query) {
            const std::int64_t end = ends_[query];
            auto* const first = order_.data() + begin;
            auto* last = order_.data() + end;
            std::make_heap(first, last, has_lower_bound);
            while (first != last && visit(at(*first).query, at(*first).row, at(*first).bound)) {
                std::pop_heap(first, last, has_lower_bound);
                --last;
            }
            begin = end;
        }
        waiting_.clear();
    }

  private:
    static constexpr std::int64_t kCapacity = 1 << 14;  // 256 KiB, and more than a chunk of queries
    static constexpr std::int64_t kPerQuery = 64;

    struct Pair {
        std::int32_t row;
        std::int32_t query;
        float bound;
    };

    const Pair& at(std::int32_t number) const { return waiting_[static_cast<std::size_t>(number)]; }

    // By counting; afterwards ends_[q] is where query q ends.
    void sort_by_query() {
        std::fill(ends_.begin(), ends_.end(), 0);
        for (const Pair& pair : waiting_) {
            ++ends_[static_cast<std::size_t>(pair.query) + 1];
        }
        for (std::size_t query = 1; query < ends_.size(); ++query) {
            ends_[query] += ends_[query - 1];
        }
        order_.resize(waiting_.size());
        for (std::int32_t i = 0; i < std::ssize(waiting_); ++i) {
            order_[static_cast<std::size_t>(ends_[static_cast<std::size_t>(at(i).query)]++)] = i;
        }
    }

    std::int64_t capacity_;
    std::vector<Pair> waiting_;
    std::vector<std::int32_t> order_;
    std::vector<std::int64_t> ends_;
};

}  // namespace rep_fast
