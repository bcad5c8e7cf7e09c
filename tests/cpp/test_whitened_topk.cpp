#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cpu/whitened_topk.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();

// Exactly as long as it must be, so that the address sanitizer sees every read beyond.
template <class T>
std::vector<T> random_numbers(std::int64_t count, std::mt19937& generator) {
    std::vector<T> numbers(static_cast<std::size_t>(count));
    std::normal_distribution<float> normal;
    for (T& number : numbers) {
        const float value = normal(generator);
        if constexpr (std::is_same_v<T, float>) {
            number = value;
        } else if constexpr (std::is_same_v<T, BFloat16>) {
            number.bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
        } else {  // sign, an exponent around 2⁰, random fraction
            number.bits = static_cast<std::uint16_t>((generator() & 0x83ffu) | (13u + generator() % 4u) << 10);
        }
    }
    return numbers;
}

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

template <class T>
void test_shape(std::int64_t n_keys, std::int64_t n_queries, std::int64_t key_dim, std::int64_t k, CpuLevel level) {
    std::mt19937 generator(static_cast<unsigned>(n_keys * 31 + n_queries));
    const std::int64_t padding = n_keys % 3;
    const auto keys = random_numbers<T>(n_keys * (key_dim + padding) - padding, generator);
    const auto queries = random_numbers<float>(n_queries * key_dim, generator);
    const MatrixView<const T> key_view{keys.data(), n_keys, key_dim, key_dim + padding};
    ScanInput input{.keys = key_view, .queries = {queries.data(), n_queries, key_dim, key_dim}};
    for (const auto precision : {ScanPrecision::kFloat32, ScanPrecision::kFloat64}) {
        for (const int n_threads : {1, 3}) {
            input.precision = precision;
            State state(n_queries, k);
            const ScanReport report = whitened_topk(input, state.view, level, n_threads);
            EXPECT(report.n_nonfinite_keys == 0 && report.first_nonfinite_key == -1);
            expect_is_top(state, key_view, input.queries);
        }
    }
}

void test_survivors_are_few(CpuLevel level) {
    std::mt19937 generator(7);
    constexpr std::int64_t kKeys = 1000, kQueries = 20, kDim = 64;
    const auto keys = random_numbers<float>(kKeys * kDim, generator);
    const auto queries = random_numbers<float>(kQueries * kDim, generator);
    State state(kQueries, 5);
    const ScanInput input{.keys = MatrixView<const float>{keys.data(), kKeys, kDim, kDim},
                          .queries = {queries.data(), kQueries, kDim, kDim}};
    // k(1 + ln(n/k)) ≈ 31 records per query are expected of a random order
    EXPECT(whitened_topk(input, state.view, level, 1).n_rescored < 2 * 31 * kQueries);
    // and none of a block that was seen before, but for the hits themselves
    EXPECT(whitened_topk(input, state.view, level, 1).n_rescored <= 6 * kQueries);
}

void test_nonfinite(CpuLevel level) {
    std::mt19937 generator(9);
    auto keys = random_numbers<float>(300 * 20, generator);
    auto queries = random_numbers<float>(3 * 20, generator);
    keys[250 * 20 + 19] = std::numeric_limits<float>::infinity();
    keys[123 * 20] = std::numeric_limits<float>::quiet_NaN();
    queries[25] = std::numeric_limits<float>::quiet_NaN();
    State state(3, 300);
    const ScanInput input{.keys = MatrixView<const float>{keys.data(), 300, 20, 20},
                          .queries = {queries.data(), 3, 20, 20}};
    const ScanReport report = whitened_topk(input, state.view, level, 2);
    EXPECT(report.n_nonfinite_keys == 2 && report.first_nonfinite_key == 123);
    EXPECT(!state.dropped[0] && state.dropped[1] && !state.dropped[2]);
    EXPECT(state.view.ids.row(0)[297] >= 0 && state.view.ids.row(0)[298] == -1);
    EXPECT(state.view.ids.row(1)[0] == -1);
}

void test_refuses_sizes_that_do_not_fit(CpuLevel level) {
    const std::vector<float> numbers(12);
    const std::vector<std::int64_t> three = {0, 1, 2};
    State state(2, 1);
    const ScanInput good{.keys = MatrixView<const float>{numbers.data(), 4, 3, 3},
                         .queries = {numbers.data(), 2, 3, 3}};
    ScanInput narrow = good, rule = good, pairs = good;
    narrow.queries.cols = 2;
    rule.last_token = {.token_ids = three, .sequence_starts = three, .last_tokens = three};
    pairs.pairs = {.indptr = three, .subjects = three};
    for (const auto& [input, message] : {std::pair(&narrow, "keys are 3 wide, queries 2"),
                                         std::pair(&rule, "the last-token rule does not fit 4 keys and 2 queries"),
                                         std::pair(&pairs, "the pair rule does not fit 4 keys")}) {
        try {
            whitened_topk(*input, state.view, level, 1);
            EXPECT(false);
        } catch (const Error& error) {
            EXPECT(std::strcmp(error.what(), message) == 0);
        }
    }
}

template <class T>
void test_shapes(CpuLevel level) {
    test_shape<T>(1, 1, 1, 1, level);
    test_shape<T>(5, 15, 255, 3, level);
    test_shape<T>(7, 17, 257, 9, level);
    test_shape<T>(97, 3, 33, 100, level);
    test_shape<T>(193, 31, 15, 4, level);
}

}  // namespace

void test_whitened_topk(CpuLevel level) {
    test_shapes<float>(level);
    test_shapes<BFloat16>(level);
    test_shapes<Float16>(level);
    test_shape<float>(100, 520, 12, 5, level);  // more than one chunk of queries
    test_survivors_are_few(level);
    test_nonfinite(level);
    test_refuses_sizes_that_do_not_fit(level);
}

}  // namespace rep_fast::tests
