#include "cpu/running_hits.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "cpu/packed_queries.h"

namespace rep_fast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

bool is_excluded(const LastTokenRule& rule, std::int64_t row, std::int64_t query) {
    if (rule.token_ids.empty()) {
        return false;
    }
    const auto after = std::upper_bound(rule.sequence_starts.begin(), rule.sequence_starts.end(), row);
    const std::int64_t start = *(after - 1);
    const std::int64_t token = rule.last_tokens[static_cast<std::size_t>(query)];
    const auto n_lookback = static_cast<std::int64_t>(rule.lookback.size());
    const std::int64_t first = std::max(start == 0 ? -n_lookback : start, row - rule.window);
    for (std::int64_t position = row; position >= first; --position) {
        const std::int64_t here = position >= 0 ? rule.token_ids[static_cast<std::size_t>(position)]
                                                : rule.lookback[static_cast<std::size_t>(n_lookback + position)];
        if (here == token) {
            return true;
        }
    }
    return false;
}

bool is_excluded(const PairRule& rule, std::int64_t row, std::int64_t query) {
    if (rule.indptr.empty()) {
        return false;
    }
    const auto* const begin = rule.subjects.data() + rule.indptr[static_cast<std::size_t>(row)];
    const auto* const end = rule.subjects.data() + rule.indptr[static_cast<std::size_t>(row) + 1];
    return std::find(begin, end, query) != end;
}

}  // namespace

bool is_excluded(const ScanInput& input, std::int64_t row, std::int64_t query) {
    return is_excluded(input.last_token, row, query) || is_excluded(input.pairs, row, query);
}

RunningHits::RunningHits(const ScanState& state, std::int64_t n_padded)
    : k_(state.scores.cols),
      floors_(static_cast<std::size_t>(state.scores.rows)),
      hits_(floors_.size()),
      expected_(floors_.size()),
      thresholds_(static_cast<std::size_t>(n_padded), std::numeric_limits<float>::infinity()) {
    for (std::int64_t query = 0; query < state.scores.rows; ++query) {
        const std::int64_t last_id = state.ids.row(query)[k_ - 1];
        // what the state would not take need not be collected: only better hits than its k-th
        floors_[static_cast<std::size_t>(query)] = last_id < 0
                                                       ? Hit{-kInfinity, std::numeric_limits<std::int64_t>::max()}
                                                       : Hit{state.scores.row(query)[k_ - 1], last_id};
        if (!state.query_dropped[static_cast<std::size_t>(query)]) {
            for (std::int64_t i = 0; i < k_ && state.ids.row(query)[i] >= 0; ++i) {
                expect(query, round_down(state.scores.row(query)[i]));
            }
            update_threshold(query);
        }
    }
}

void RunningHits::take(std::int64_t query, const Hit& hit) {
    auto& hits = hits_[static_cast<std::size_t>(query)];
    if (std::ssize(hits) == k_) {
        std::pop_heap(hits.begin(), hits.end(), is_better);
        hits.back() = hit;
    } else {
        hits.push_back(hit);
    }
    std::push_heap(hits.begin(), hits.end(), is_better);
    update_threshold(query);
}

void RunningHits::expect(std::int64_t query, float lower) {
    auto& expected = expected_[static_cast<std::size_t>(query)];
    if (std::ssize(expected) == k_) {
        if (!(lower > expected.front())) {
            return;
        }
        std::pop_heap(expected.begin(), expected.end(), std::greater<>());
        expected.back() = lower;
    } else {
        expected.push_back(lower);
    }
    std::push_heap(expected.begin(), expected.end(), std::greater<>());
    update_threshold(query);
}

void RunningHits::update_threshold(std::int64_t query) {
    const auto& hits = hits_[static_cast<std::size_t>(query)];
    const double floor = floors_[static_cast<std::size_t>(query)].score;
    const double worst = std::ssize(hits) < k_ ? -kInfinity : hits.front().score;
    const auto& expected = expected_[static_cast<std::size_t>(query)];
    const float least = std::ssize(expected) < k_ ? -std::numeric_limits<float>::infinity() : expected.front();
    thresholds_[static_cast<std::size_t>(query)] = std::max(round_down(std::max(floor, worst)), least);
}

void merge_hits(std::span<const RunningHits> found, const ScanState& state) {
    const std::int64_t k = state.scores.cols;
    std::vector<Hit> all;
    for (std::int64_t query = 0; query < state.scores.rows; ++query) {
        all.clear();
        for (std::int64_t i = 0; i < k && state.ids.row(query)[i] >= 0; ++i) {
            all.push_back({state.scores.row(query)[i], state.ids.row(query)[i]});
        }
        for (const RunningHits& part : found) {
            all.insert(all.end(), part.of(query).begin(), part.of(query).end());
        }
        std::sort(all.begin(), all.end(), is_better);
        for (std::int64_t i = 0; i < std::min(k, std::ssize(all)); ++i) {
            state.scores.row(query)[i] = all[static_cast<std::size_t>(i)].score;
            state.ids.row(query)[i] = all[static_cast<std::size_t>(i)].id;
        }
    }
}

}  // namespace rep_fast
