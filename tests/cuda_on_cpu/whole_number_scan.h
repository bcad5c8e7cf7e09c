// A scan that tests can answer by brute force, for every body of the selection.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "core/dtype.h"

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Hit {
    double score;
    std::int64_t id;
    bool operator==(const Hit&) const = default;
};

inline bool is_better(const Hit& a, const Hit& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// A scan whose keys are small whole numbers, so that every float64 sum is exact in any order and equal scores abound.
struct Scan {
    std::int64_t n_keys, n_queries, key_dim, k, stride;
    std::vector<rep_fast::BFloat16> keys;
    std::vector<float> queries;
    std::vector<std::int64_t> tokens, starts{0}, last_tokens, lookback;
    std::vector<std::vector<std::int64_t>> listed;  // per row, queries it is excluded for; empty: there is no list
    std::int64_t window = 3;
    std::mt19937 random;

    Scan(std::int64_t keys_, std::int64_t queries_, std::int64_t dim, std::int64_t k_, unsigned seed,
         std::int64_t padding = 3)
        : n_keys(keys_), n_queries(queries_), key_dim(dim), k(k_), stride(dim + padding), random(seed) {
        std::uniform_int_distribution<int> small(-4, 4), token(0, 20);
        keys.assign(static_cast<std::size_t>(n_keys * stride), rep_fast::BFloat16{0x7fc0});  // padding is NaN
        for (std::int64_t i = 0; i < n_keys; ++i) {
            for (std::int64_t j = 0; j < dim; ++j) {
                const auto value = static_cast<float>(small(random));
                keys[static_cast<std::size_t>(i * stride + j)] = {
                    static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16)};
            }
            tokens.push_back(token(random));
            if (i > 0 && i % 37 == 0) {
                starts.push_back(i);
            }
        }
        for (std::int64_t i = 0; i < n_queries * dim; ++i) {
            queries.push_back(static_cast<float>(small(random)));
        }
        for (std::int64_t i = 0; i < n_queries; ++i) {
            last_tokens.push_back(token(random));
        }
        lookback = {token(random), token(random)};
    }

    double exact(std::int64_t query, std::int64_t row) const {
        double sum = 0.0;
        for (std::int64_t j = 0; j < key_dim; ++j) {
            sum += static_cast<double>(rep_fast::to_float(keys[static_cast<std::size_t>(row * stride + j)])) *
                   static_cast<double>(queries[static_cast<std::size_t>(query * key_dim + j)]);
        }
        return sum;
    }

    bool is_excluded(std::int64_t query, std::int64_t row) const {
        for (std::int64_t back = 0; back <= window; ++back) {
            const std::int64_t position = row - back;
            const auto n_lookback = static_cast<std::int64_t>(lookback.size());
            if (position < -n_lookback) {
                return false;
            }
            const std::int64_t here = position >= 0 ? tokens[static_cast<std::size_t>(position)]
                                                    : lookback[static_cast<std::size_t>(n_lookback + position)];
            if (here == last_tokens[static_cast<std::size_t>(query)]) {
                return true;
            }
            if (position >= 0 && std::ranges::find(starts, position) != starts.end() && position != 0) {
                return false;  // what lies before is another sequence
            }
        }
        return false;
    }

    bool is_listed(std::int64_t query, std::int64_t row) const {
        return !listed.empty() && std::ranges::count(listed[static_cast<std::size_t>(row)], query) > 0;
    }

    std::vector<Hit> brute_force(std::int64_t query, bool with_rule, const std::vector<bool>& is_finite) const {
        std::vector<Hit> all;
        for (std::int64_t row = 0; row < n_keys; ++row) {
            const bool is_out = (with_rule && is_excluded(query, row)) || is_listed(query, row);
            if (is_finite[static_cast<std::size_t>(row)] && !is_out) {
                all.push_back({exact(query, row), 1000 + row});
            }
        }
        std::sort(all.begin(), all.end(), is_better);
        all.resize(static_cast<std::size_t>(k), {-kInfinity, -1});
        return all;
    }
};

struct Found {
    std::vector<double> scores;
    std::vector<std::int64_t> ids;
    std::int64_t n_nonfinite = 0, first_nonfinite = std::numeric_limits<std::int64_t>::max();
};

inline void expect_brute_force(const Scan& input, const Found& found, bool with_rule,
                               const std::vector<bool>& is_finite) {
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        const auto wanted = input.brute_force(query, with_rule, is_finite);
        for (std::int64_t place = 0; place < input.k; ++place) {
            const auto at = static_cast<std::size_t>(query * input.k + place);
            EXPECT((Hit{found.scores[at], found.ids[at]} == wanted[static_cast<std::size_t>(place)]));
        }
    }
}
