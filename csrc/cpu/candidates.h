// Pairs that a fast pass could not rule out, waiting to be scored in float64.
//
// They wait as long as there is room: the bounds of later pairs rule earlier ones out, at the price of a comparison.
// The rest is scored query by query, the highest bound first: the first few raise the query's threshold above the
// bounds of most others, which then need no score. Of a stream's first block that leaves about k pairs per query
// instead of the k·(1 + ln(n/k)) records of a random order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

namespace rep_fast {

class Candidates {
  public:
    struct Pair {
        std::int32_t row;
        std::int32_t query;
        float bound;
    };

    // n_queries: numbers of queries are below; k: hits per query. Rows and queries fit 32 bits.
    Candidates(std::int64_t n_queries, std::int64_t k)
        : capacity_(std::max(std::min(kCapacity, kPerQuery * n_queries), 2 * k * n_queries)),
          ends_(static_cast<std::size_t>(n_queries) + 1) {
        waiting_.reserve(static_cast<std::size_t>(capacity_));
    }

    // Room for so many more without growing.
    std::int64_t room() const { return capacity_ - std::ssize(waiting_); }
    bool is_half_full() const { return 2 * std::ssize(waiting_) >= capacity_; }

    // Drops the pairs whose bound is below their query's threshold.
    void drop_below(const float* thresholds) {
        std::erase_if(waiting_, [&](const Pair& pair) { return pair.bound < thresholds[pair.query]; });
    }

    // bound: not below the pair's score; NaN is taken for infinity.
    void add(std::int64_t query, std::int64_t row, float bound) {
        waiting_.push_back({static_cast<std::int32_t>(row), static_cast<std::int32_t>(query),
                            std::isnan(bound) ? std::numeric_limits<float>::infinity() : bound});
    }

    // Empties itself into visit(pair, row of the query's next pair), whose answer says whether the pair and the query's
    // pairs of lower bounds are still of interest.
    template <class Visit>
    void drain(const Visit& visit) {
        visit_best(std::numeric_limits<std::int64_t>::max(), visit);
        waiting_.clear();
    }

    // The same with n pairs per query at most; the others go on waiting.
    template <class Visit>
    void visit_best(std::int64_t n, const Visit& visit) {
        sort_by_query();
        const auto has_higher_bound = [&](std::int32_t a, std::int32_t b) { return at(a).bound > at(b).bound; };
        std::int64_t begin = 0;
        for (std::size_t query = 0; query + 1 < ends_.size(); ++query) {
            const std::int64_t end = ends_[query];
            const auto own =
                std::span(order_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
            std::ranges::sort(own, has_higher_bound);
            const auto n_visited = std::min(static_cast<std::size_t>(n), own.size());
            for (std::size_t i = 0; i < n_visited; ++i) {
                Pair& best = waiting_[static_cast<std::size_t>(own[i])];
                const std::int32_t next = own[std::min(i + 1, own.size() - 1)];
                if (!visit(best, at(next).row)) {
                    break;
                }
                best.row = kVisited;
            }
            begin = end;
        }
        std::erase_if(waiting_, [](const Pair& pair) { return pair.row == kVisited; });
    }

  private:
    static constexpr std::int64_t kCapacity = 1 << 14;  // 256 KiB, and more than a chunk of queries
    static constexpr std::int64_t kPerQuery = 64;
    static constexpr std::int32_t kVisited = -1;

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
