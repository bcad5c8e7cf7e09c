// Numbers, a state and the definition that the tests of the scan share.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"
#include "key_numbers.h"

namespace rep_fast::tests {

inline constexpr double kNone = -std::numeric_limits<double>::infinity();

struct State {
    State(std::int64_t n_queries, std::int64_t k_)
        : k(k_),
          scores(static_cast<std::size_t>(n_queries * k), kNone),
          ids(scores.size(), -1),
          dropped(std::make_unique<bool[]>(static_cast<std::size_t>(n_queries))),
          view{{scores.data(), n_queries, k, k},
               {ids.data(), n_queries, k, k},
               {dropped.get(), static_cast<std::size_t>(n_queries)}} {}

    std::int64_t k;
    std::vector<double> scores;
    std::vector<std::int64_t> ids;
    std::unique_ptr<bool[]> dropped;
    ScanState view;
};

// The definition: every pair scored in float64 in the fixed order (lanes of 16, folded in halves), then sorted.
template <class T>
void expect_is_top(const State& state, const MatrixView<const T>& keys, const MatrixView<const float>& queries) {
    for (std::int64_t query = 0; query < queries.rows; ++query) {
        std::vector<std::pair<double, std::int64_t>> all;
        for (std::int64_t row = 0; row < keys.rows; ++row) {
            double lanes[kExactLanes] = {};
            for (std::int64_t j = 0; j < keys.cols; ++j) {
                lanes[j % kExactLanes] +=
                    static_cast<double>(to_float(keys.row(row)[j])) * static_cast<double>(queries.row(query)[j]);
            }
            for (std::int64_t half = kExactLanes / 2; half > 0; half /= 2) {
                for (std::int64_t lane = 0; lane < half; ++lane) {
                    lanes[lane] += lanes[lane + half];
                }
            }
            all.emplace_back(-lanes[0], row);
        }
        std::sort(all.begin(), all.end());
        for (std::int64_t i = 0; i < state.k; ++i) {
            const bool there = i < keys.rows;
            const auto [negative, id] = there ? all[static_cast<std::size_t>(i)] : std::pair(-kNone, std::int64_t{-1});
            EXPECT(state.view.scores.row(query)[i] == -negative);
            EXPECT(state.view.ids.row(query)[i] == id);
        }
    }
}

inline BFloat16 truncated(float value) {
    return {static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16)};
}

}  // namespace rep_fast::tests
