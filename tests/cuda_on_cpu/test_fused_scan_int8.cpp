// The fused scan of keys in whole steps: its lists hold what the steps and margins say, and hits are exact.
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cuda/fused_scan.h"
#include "cuda/number.cuh"
#include "cuda/quantised_rows.h"
#include "executor.h"
#include "fused_case.h"
#include "key_numbers.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::DType;
using rep_fast::tests::as_key;
namespace cuda = rep_fast::cuda;

constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The whole numbers of keys and queries are their values, and every row has a step of its own, a power of two, so that
// steps times sums are the scores and all that a margin lets through is known.
struct Case : FusedCase {
    std::int64_t padded_width;
    std::vector<std::int8_t> key_values, query_values;
    std::vector<float> key_steps, query_steps, key_margins, query_margins;

    Case(std::int64_t keys_, std::int64_t queries_, std::int64_t dim, std::int64_t k_, unsigned seed)
        : FusedCase(keys_, queries_, dim, k_, seed),
          padded_width((dim + cuda::kQuantisedMultiple - 1) / cuda::kQuantisedMultiple * cuda::kQuantisedMultiple),
          key_values(static_cast<std::size_t>(n_keys * padded_width)),
          query_values(static_cast<std::size_t>(n_queries * padded_width)),
          key_margins(static_cast<std::size_t>(n_keys)),
          query_margins(static_cast<std::size_t>(n_queries)) {
        for (std::int64_t row = 0; row < n_keys; ++row) {
            key_steps.push_back(step());
            for (std::int64_t j = 0; j < dim; ++j) {
                BFloat16& key = keys[static_cast<std::size_t>(row * stride + j)];
                const float whole = rep_fast::to_float(key);
                key_values[static_cast<std::size_t>(row * padded_width + j)] = static_cast<std::int8_t>(whole);
                key = as_key<BFloat16>(whole * key_steps.back());
            }
        }
        for (std::int64_t query = 0; query < n_queries; ++query) {
            query_steps.push_back(step());
            for (std::int64_t j = 0; j < dim; ++j) {
                float& weight = queries[static_cast<std::size_t>(query * dim + j)];
                query_values[static_cast<std::size_t>(query * padded_width + j)] = static_cast<std::int8_t>(weight);
                weight *= query_steps.back();
            }
        }
    }

    float step() { return std::ldexp(1.0f, static_cast<int>(random() % 5) - 2); }

    void give_operands(cuda::FusedScan& scan, std::int64_t first) const {
        scan.factor = query_values.data();
        scan.factor_stride = padded_width;
        scan.steps = {&key_values[static_cast<std::size_t>(first * padded_width)], padded_width,
                      &key_steps[static_cast<std::size_t>(first)], &key_margins[static_cast<std::size_t>(first)],
                      query_steps.data()};
        // nobody counts here
        scan.counters = {};
    }

    // What the margins of a pair, as Int8Sums defines them, add to its score.
    [[nodiscard]] double reach(std::int64_t query, std::int64_t row) const {
        const auto q = static_cast<std::size_t>(query), r = static_cast<std::size_t>(row);
        return static_cast<double>(key_steps[r]) * static_cast<double>(query_margins[q]) +
               static_cast<double>(query_steps[q]) * static_cast<double>(key_margins[r]);
    }
};

Found scan(Case& input, std::int64_t chunk, std::int64_t n_before = 0) {
    return scan_by(input, chunk, n_before, input.query_margins,
                   [&](cuda::FusedScan& one, std::int64_t first) { input.give_operands(one, first); });
}

void test_hits_are_exact() {
    const struct {
        std::int64_t n_keys, n_queries, key_dim, k, chunk, n_before;
    } cases[] = {{1, 1, 1, 1, 1, 0},          {5, 3, 7, 10, 5, 0},         {127, 2, 128, 3, 127, 0},
                 {129, 9, 129, 4, 128, 0},    {600, 127, 24, 2, 150, 300}, {300, 130, 33, 5, 150, 150},
                 {360, 257, 16, 3, 260, 100}, {240, 3, 1000, 4, 140, 100}, {240, 200, 600, 2, 140, 100}};
    for (const auto& one : cases) {
        for (const bool with_rule : {false, true}) {
            Case input(one.n_keys, one.n_queries, one.key_dim, one.k, 7);
            input.with_rule = with_rule;
            cuda_on_cpu::set_seed(static_cast<std::uint64_t>(one.n_keys));
            expect_brute_force(input, scan(input, one.chunk, one.n_before), with_rule, input.all_finite());
        }
    }
}

void test_schedule_and_lists_change_nothing() {
    Case input(700, 5, 900, 6, 3);  // more stages than the ring has
    input.query_margins.assign(5, 7.5f);
    cuda_on_cpu::set_seed(0);
    const Found first = scan(input, 700, 100);
    expect_brute_force(input, first, false, input.all_finite());
    for (std::uint64_t seed = 1; seed < 5; ++seed) {
        cuda_on_cpu::set_seed(seed);
        input.capacity = seed == 4 ? 1 : static_cast<std::int64_t>(20 * seed);
        EXPECT(same_bits(first, scan(input, seed % 2 == 0 ? 700 : 250, 100)));
    }
}

// The list of a query holds every pair whose score and margins reach its k-th best, and none that is short of it by
// more than four float32 roundings can close.
void test_lists_hold_what_the_margins_say(std::int64_t key_dim, float of_keys, float of_queries) {
    Case input(900, 140, key_dim, 5, 13);
    for (float& margin : input.key_margins) {
        margin = of_keys * static_cast<float>(input.random() % 8);
    }
    for (float& margin : input.query_margins) {
        margin = of_queries * static_cast<float>(input.random() % 8);
    }
    auto is_finite = input.all_finite();
    for (const std::size_t row : {500u, 899u}) {  // in no list
        is_finite[row] = false;
        input.key_margins[row] = kNaN;
        input.keys[row * static_cast<std::size_t>(input.stride)] = {0x7fc1};
    }
    expect_brute_force(input, scan(input, 450, 450), false, is_finite);
    const Found before = state_after(input, 450);
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        const double floor = before.scores[static_cast<std::size_t>(query * input.k + input.k - 1)];
        std::int64_t least = 0, most = 0;
        for (std::int64_t row = 450; row < 900; ++row) {
            const double score = input.exact(query, row), reach = input.reach(query, row);
            const double roundings = 4 * 0x1p-23 * (std::abs(score) + 2 * reach);
            least += score + reach >= floor ? 1 : 0;
            most += score + reach + roundings >= floor ? 1 : 0;
        }
        const auto listed = static_cast<std::int64_t>(input.counts[static_cast<std::size_t>(query)]);
        EXPECT(least <= listed && listed <= most);
    }
}

// Rows without steps, on either side: NaN is left out, and what a finite row's infinite margin says is nothing.
void test_rows_without_steps() {
    for (const std::int64_t capacity : {1000, 3}) {
        Case input(400, 3, 20, 8, 3);
        input.capacity = capacity;
        auto is_finite = input.all_finite();
        for (const std::size_t row : {17u, 399u}) {
            is_finite[row] = false;
            input.key_margins[row] = kNaN;
            input.keys[row * static_cast<std::size_t>(input.stride)] = {0x7fc1};
        }
        for (const std::size_t row : {30u, 250u}) {
            input.key_margins[row] = kFloatInfinity;
            input.key_steps[row] = 0.0f;
        }
        input.query_margins[1] = kFloatInfinity;
        input.query_steps[1] = 0.0f;
        expect_brute_force(input, scan(input, 150, 10), false, is_finite);
    }
}

void test_a_query_without_margin_keeps_its_state() {
    Case input(50, 2, 8, 4, 1);
    input.query_margins[0] = kNaN;
    const Found found = scan(input, 30);
    for (std::size_t place = 0; place < 4; ++place) {
        EXPECT(found.ids[place] == -1 && found.scores[place] == -kInfinity);
        EXPECT(found.ids[4 + place] >= 0);
    }
}

// The keys themselves are read for exact scores alone: of any type, wherever their rows begin.
template <class Key>
void test_keys_of_any_type() {
    Case input(300, 4, 30, 5, 23);
    const std::int64_t stride = input.key_dim + 1;
    Guarded<Key> keys(static_cast<std::size_t>(input.n_keys * stride));
    for (std::int64_t row = 0; row < input.n_keys; ++row) {
        for (std::int64_t j = 0; j < input.key_dim; ++j) {
            const float value = rep_fast::to_float(input.keys[static_cast<std::size_t>(row * input.stride + j)]);
            keys[static_cast<std::size_t>(row * stride + j)] = rep_fast::cuda::narrowed<Key>(value);
        }
    }
    const Found found = scan_by(input, 120, 100, input.query_margins, [&](cuda::FusedScan& one, std::int64_t first) {
        input.give_operands(one, first);
        one.selection.keys.data = &keys[static_cast<std::size_t>(first * stride)];
        one.selection.keys.dtype = rep_fast::dtype_of<Key>;
        one.selection.keys.row_stride = stride;
        EXPECT(cuda::can_fuse(one));
    });
    expect_brute_force(input, found, false, input.all_finite());
}

void test_two_parts_are_refused() {
    Case input(20, 2, 8, 3, 1);
    std::string what;
    try {
        scan_by(input, 20, 0, input.query_margins, [&](cuda::FusedScan& one, std::int64_t first) {
            input.give_operands(one, first);
            one.n_parts = 2;
        });
    } catch (const rep_fast::Error& error) {
        what = error.what();
    }
    EXPECT(what.find("multiplied once, got 2 parts") != std::string::npos);
}

}  // namespace

void test_fused_scan_int8() {
    test_hits_are_exact();
    test_schedule_and_lists_change_nothing();
    test_lists_hold_what_the_margins_say(300, 0.0f, 0.0f);
    test_lists_hold_what_the_margins_say(40, 3.7f, 0.0f);
    test_lists_hold_what_the_margins_say(40, 0.0f, 3.7f);
    test_lists_hold_what_the_margins_say(40, 1.3f, 2.1f);
    test_rows_without_steps();
    test_a_query_without_margin_keeps_its_state();
    test_keys_of_any_type<float>();
    test_keys_of_any_type<BFloat16>();
    test_keys_of_any_type<rep_fast::Float16>();
    test_two_parts_are_refused();
}
