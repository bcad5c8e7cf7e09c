// Selection of hits from approximate scores, against brute force: whatever the approximation does inside its bound, the
// hits are those of the exact scores.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/whitened_topk.h"
#include "executor.h"
#include "tests.h"
#include "whole_number_scan.h"

namespace {

using rep_fast::DType;
namespace cuda = rep_fast::cuda;

std::vector<float> margins_of(const Scan& input, float relative_margin) {
    std::vector<float> margins;
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        double square = 0.0;
        for (std::int64_t j = 0; j < input.key_dim; ++j) {
            const double value = input.queries[static_cast<std::size_t>(query * input.key_dim + j)];
            square += value * value;
        }
        margins.push_back(relative_margin * static_cast<float>(std::sqrt(square)));
    }
    return margins;
}

// Scores of the rows from `first` on, one per norm, anywhere inside the bound.
std::vector<float> approximate_scores(Scan& input, std::int64_t first, const std::vector<float>& norms,
                                      const std::vector<float>& margins, float slack) {
    std::vector<float> approximate;
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        for (std::int64_t row = 0; row < std::ssize(norms); ++row) {
            const double exact = input.exact(query, first + row);
            const float share = std::uniform_real_distribution<float>(-0.999f, 0.999f)(input.random);
            const float norm = norms[static_cast<std::size_t>(row)];
            const float error =
                std::isfinite(norm) ? share * (norm * margins[static_cast<std::size_t>(query)] + slack) : 0.0f;
            // what overflowed on the way may end anywhere
            const bool overflows = norm * margins[static_cast<std::size_t>(query)] >= 0x1p100f;
            approximate.push_back(overflows ? -std::numeric_limits<float>::infinity()
                                            : static_cast<float>(exact) + error);
        }
    }
    return approximate;
}

// Rules of exclusion; `indptr` and `subjects` are filled and must stay.
void set_rules(const Scan& input, bool with_rule, std::vector<std::int64_t>& indptr,
               std::vector<std::int64_t>& subjects, cuda::Selection& selection) {
    if (with_rule) {
        selection.last_token = {input.tokens.data(),
                                input.starts.data(),
                                std::ssize(input.starts),
                                input.last_tokens.data(),
                                input.lookback.data(),
                                std::ssize(input.lookback),
                                input.window};
    }
    if (!input.listed.empty()) {
        indptr = {0};
        for (const auto& excluded_for : input.listed) {
            subjects.insert(subjects.end(), excluded_for.begin(), excluded_for.end());
            indptr.push_back(std::ssize(subjects));
        }
        selection.pairs = {indptr.data(), subjects.data()};
    }
}

// Scans in chunks of `chunk` keys.
Found scan(Scan& input, std::int64_t chunk, bool with_rule, float relative_margin, float slack = 0.0f,
           bool is_backwards = false) {
    Found found;
    found.scores.assign(static_cast<std::size_t>(input.n_queries * input.k), -kInfinity);
    found.ids.assign(static_cast<std::size_t>(input.n_queries * input.k), -1);
    const std::vector<float> margins = margins_of(input, relative_margin);
    const std::vector<float> slacks(static_cast<std::size_t>(input.n_queries), slack);
    std::vector<std::int64_t> indptr, subjects;
    cuda::Selection selection;
    selection.first_id = 1000;
    selection.queries = input.queries.data();
    selection.query_stride = input.key_dim;
    selection.query_margins = margins.data();
    selection.query_slacks = slacks.data();
    selection.n_queries = input.n_queries;
    selection.scores = found.scores.data();
    selection.ids = found.ids.data();
    selection.k = input.k;
    set_rules(input, with_rule, indptr, subjects, selection);
    const std::int64_t n_chunks = (input.n_keys + chunk - 1) / chunk;
    for (std::int64_t number = 0; number < n_chunks; ++number) {
        const std::int64_t first = chunk * (is_backwards ? n_chunks - 1 - number : number);
        const std::int64_t rows = std::min(chunk, input.n_keys - first);
        selection.keys = {&input.keys[static_cast<std::size_t>(first * input.stride)], DType::kBFloat16, rows,
                          input.key_dim, input.stride};
        std::vector<float> norms(static_cast<std::size_t>(rows));
        cuda::measure_keys(selection.keys, 1000 + first, {norms.data(), &found.n_nonfinite, &found.first_nonfinite},
                           nullptr);
        const std::vector<float> approximate = approximate_scores(input, first, norms, margins, slack);
        selection.key_norms = norms.data();
        selection.first_row = first;
        selection.approximate = approximate.data();
        selection.approximate_stride = rows;
        cuda::select_hits(selection, nullptr);
    }
    return found;
}

void test_hits_are_exact() {
    const struct {
        std::int64_t n_keys, n_queries, key_dim, k, chunk;
    } cases[] = {{1, 1, 1, 1, 1},        {5, 3, 7, 10, 5},       {300, 4, 33, 10, 300}, {2100, 1, 40, 5, 900},
                 {2100, 1, 40, 5, 2100}, {1025, 1, 65, 1, 1024}, {300, 2, 31, 280, 200}};
    for (const auto& one : cases) {
        for (const bool with_rule : {false, true}) {
            for (const float margin : {0.0f, 0.05f}) {
                Scan input(one.n_keys, one.n_queries, one.key_dim, one.k, 7);
                cuda_on_cpu::set_seed(static_cast<std::uint64_t>(one.n_keys));
                const Found found = scan(input, one.chunk, with_rule, margin);
                EXPECT(found.n_nonfinite == 0);
                expect_brute_force(input, found, with_rule,
                                   std::vector<bool>(static_cast<std::size_t>(one.n_keys), true));
            }
        }
    }
}

void test_rows_that_are_not_finite_are_left_out_and_counted() {
    Scan input(400, 3, 20, 8, 3);
    std::vector<bool> is_finite(400, true);
    for (const std::size_t row : {17u, 18u, 399u}) {
        is_finite[row] = false;
        input.keys[row * static_cast<std::size_t>(input.stride) + row % 20] = {
            static_cast<std::uint16_t>(row == 18 ? 0xff80 : 0x7fc1)};
    }
    const Found found = scan(input, 150, false, 0.02f);
    EXPECT(found.n_nonfinite == 3);
    EXPECT(found.first_nonfinite == 1017);
    expect_brute_force(input, found, false, is_finite);
}

// A product that overflowed tells nothing: such pairs are scored exactly.
void test_approximate_scores_may_be_nan_or_infinite() {
    Scan input(200, 1, 6, 5, 11);
    std::vector<float> approximate(200, std::numeric_limits<float>::quiet_NaN());
    approximate[3] = std::numeric_limits<float>::infinity();
    std::vector<float> norms(200), margins{1.0f}, slacks{0.0f};
    Found found;
    found.scores.assign(5, -kInfinity);
    found.ids.assign(5, -1);
    const cuda::KeyChunk keys{input.keys.data(), DType::kBFloat16, 200, 6, input.stride};
    cuda::measure_keys(keys, 1000, {norms.data(), &found.n_nonfinite, &found.first_nonfinite}, nullptr);
    cuda::Selection selection;
    selection.keys = keys;
    selection.key_norms = norms.data();
    selection.first_id = 1000;
    selection.approximate = approximate.data();
    selection.approximate_stride = 200;
    selection.queries = input.queries.data();
    selection.query_stride = 6;
    selection.query_margins = margins.data();
    selection.query_slacks = slacks.data();
    selection.n_queries = 1;
    selection.scores = found.scores.data();
    selection.ids = found.ids.data();
    selection.k = 5;
    cuda::select_hits(selection, nullptr);
    expect_brute_force(input, found, false, std::vector<bool>(200, true));
}

// Terms beyond float32 cancel, and the score is the best of all.
void test_a_product_that_overflowed_is_scored_exactly() {
    Scan input(300, 1, 40, 4, 29);
    for (std::size_t j = 0; j < 40; ++j) {
        const float value = j < 2 ? 0x1p126f : j == 2 ? 0x1p98f : 0.0f;
        input.keys[static_cast<std::size_t>(290 * input.stride) + j] = {
            static_cast<std::uint16_t>(__builtin_bit_cast(std::uint32_t, value) >> 16)};
    }
    input.queries[0] = 8.0f;
    input.queries[1] = -8.0f;
    input.queries[2] = 4.0f;
    const Found found = scan(input, 150, false, 0x1p-16f);
    EXPECT(found.ids[0] == 1290);
    expect_brute_force(input, found, false, std::vector<bool>(300, true));
}

// Equal scores keep the lower id, also where it comes later.
void test_chunks_may_come_in_any_order() {
    Scan input(500, 3, 5, 40, 19);
    const Found found = scan(input, 120, true, 0.02f, 0.0f, true);
    expect_brute_force(input, found, true, std::vector<bool>(500, true));
}

// What underflows in a product takes from every score the same at most, however short the key.
void test_slack_of_a_query_counts() {
    Scan input(400, 4, 9, 6, 17);
    for (const float margin : {0.0f, 0.02f}) {
        const Found found = scan(input, 90, false, margin, 6.0f);
        expect_brute_force(input, found, false, std::vector<bool>(400, true));
    }
}

// Lists are those of the block's rows, wherever the chunk begins; some are longer than a warp, some are empty.
void test_listed_pairs_are_left_out() {
    constexpr std::int64_t kKeys = 90, kQueries = 45;
    for (const bool with_rule : {false, true}) {
        Scan input(kKeys, kQueries, 5, 4, 23);
        for (std::int64_t row = 0; row < kKeys; ++row) {
            std::vector<std::int64_t> excluded_for;
            for (std::int64_t query = 0; query < kQueries; ++query) {
                if (row % 5 != 0 && (query * 7 + row * 3) % 11 < row % 11) {
                    excluded_for.push_back(query);
                }
            }
            input.listed.push_back(excluded_for);
        }
        const Found found = scan(input, 40, with_rule, 0.01f);
        expect_brute_force(input, found, with_rule, std::vector<bool>(kKeys, true));
    }
}

// The tokens before row 0 belong to its sequence, oldest first, and none before them is looked at; row 0 has its own.
void test_the_window_reaches_into_the_block_before() {
    for (const std::int64_t window : {0, 1, 2, 3, 40}) {
        for (const std::int64_t held : {0, 1, 2}) {
            Scan input(60, 1, 4, 60, 2);
            input.window = window;
            input.lookback = {100, 101};
            input.tokens[0] = 102;
            input.last_tokens = {100 + held};
            const Found found = scan(input, 25, true, 0.01f);
            expect_brute_force(input, found, true, std::vector<bool>(60, true));
        }
    }
}

void test_a_query_without_margin_keeps_its_state() {
    Scan input(50, 2, 8, 4, 1);
    input.queries[3] = std::numeric_limits<float>::quiet_NaN();  // its norm, and so its margin, is NaN
    const Found found = scan(input, 50, false, 0.01f);
    for (std::size_t place = 0; place < 4; ++place) {
        EXPECT(found.ids[place] == -1 && found.scores[place] == -kInfinity);
        EXPECT(found.ids[4 + place] >= 0);
    }
}

void test_norms_are_upper_bounds() {
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    for (const std::int64_t width : {1, 31, 32, 33, 1000}) {
        std::vector<float> keys(static_cast<std::size_t>(9 * width));
        for (float& value : keys) {
            value = normal(random) * std::exp2(static_cast<float>(random() % 40) - 20.0f);
        }
        std::vector<float> norms(9);
        std::int64_t n_bad = 0, first_bad = 0;
        cuda::measure_keys({keys.data(), DType::kFloat32, 9, width, width}, 0, {norms.data(), &n_bad, &first_bad},
                           nullptr);
        for (std::size_t row = 0; row < 9; ++row) {
            long double square = 0;
            for (std::int64_t j = 0; j < width; ++j) {
                const long double value = keys[row * static_cast<std::size_t>(width) + static_cast<std::size_t>(j)];
                square += value * value;
            }
            const long double norm = std::sqrt(square);
            EXPECT(static_cast<long double>(norms[row]) >= norm);
            EXPECT(static_cast<long double>(norms[row]) <= norm * (1 + 0x1p-20L) + 0x1p-148L);
        }
    }
}

}  // namespace

void test_whitened_topk() {
    test_hits_are_exact();
    test_rows_that_are_not_finite_are_left_out_and_counted();
    test_approximate_scores_may_be_nan_or_infinite();
    test_a_product_that_overflowed_is_scored_exactly();
    test_chunks_may_come_in_any_order();
    test_slack_of_a_query_counts();
    test_listed_pairs_are_left_out();
    test_the_window_reaches_into_the_block_before();
    test_a_query_without_margin_keeps_its_state();
    test_norms_are_upper_bounds();
}
