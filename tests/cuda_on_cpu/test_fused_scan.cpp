// The fused scan against brute force: the same hits as any other body gives, whatever the schedule, the tile and the
// room in its lists.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cuda/fused_scan.h"
#include "executor.h"
#include "fused_case.h"
#include "key_numbers.h"
#include "tests.h"

namespace {

using rep_fast::BFloat16;
using rep_fast::DType;
using rep_fast::tests::as_key;
namespace cuda = rep_fast::cuda;

BFloat16 cut(float value) {
    return as_key<BFloat16>(value);
}

// With bfloat16 operands.
struct Case : FusedCase {
    std::int64_t factor_stride;
    int n_parts;
    float relative_margin = 0.0f;
    std::vector<BFloat16> factor;

    Case(std::int64_t keys_, std::int64_t queries_, std::int64_t dim, std::int64_t k_, unsigned seed, int parts = 1)
        : FusedCase(keys_, queries_, dim, k_, seed), factor_stride(in_eights(dim)), n_parts(parts) {}

    // The queries in parts, each of which is what bfloat16 holds of the rest.
    void split_queries() {
        factor.assign(static_cast<std::size_t>(n_parts * n_queries * factor_stride), BFloat16{0x7fc0});
        for (std::int64_t query = 0; query < n_queries; ++query) {
            for (std::int64_t j = 0; j < key_dim; ++j) {
                float rest = queries[static_cast<std::size_t>(query * key_dim + j)];
                for (int part = 0; part < n_parts; ++part) {
                    const BFloat16 kept = cut(rest);
                    factor[static_cast<std::size_t>((part * n_queries + query) * factor_stride + j)] = kept;
                    rest -= rep_fast::to_float(kept);
                }
            }
        }
    }

    void give_operands(cuda::FusedScan& scan) const {
        scan.factor = factor.data();
        scan.factor_stride = factor_stride;
        scan.n_parts = n_parts;
    }

    [[nodiscard]] float margin(std::int64_t query) const {
        double square = 0.0;
        for (std::int64_t j = 0; j < key_dim; ++j) {
            const double value = queries[static_cast<std::size_t>(query * key_dim + j)];
            square += value * value;
        }
        return relative_margin * static_cast<float>(std::sqrt(square));
    }

    [[nodiscard]] double norm(std::int64_t row) const {
        double square = 0.0;
        for (std::int64_t j = 0; j < key_dim; ++j) {
            const double value = rep_fast::to_float(keys[static_cast<std::size_t>(row * stride + j)]);
            square += value * value;
        }
        return std::sqrt(square);
    }
};

// Scans in chunks of `chunk` keys what follows the first `n_before`.
Found scan(Case& input, std::int64_t chunk, std::int64_t n_before = 0) {
    input.split_queries();
    std::vector<float> margins;
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        margins.push_back(input.margin(query));
    }
    return scan_by(input, chunk, n_before, margins,
                   [&](cuda::FusedScan& one, std::int64_t) { input.give_operands(one); });
}

void test_hits_are_exact() {
    const struct {
        std::int64_t n_keys, n_queries, key_dim, k, chunk, n_before;
    } cases[] = {{1, 1, 1, 1, 1, 0},          {5, 3, 7, 10, 5, 0},         {127, 2, 64, 3, 127, 0},
                 {129, 9, 65, 4, 128, 0},     {600, 127, 24, 2, 150, 300}, {300, 130, 33, 5, 150, 150},
                 {500, 2, 200, 6, 200, 60},   {360, 257, 8, 3, 260, 100},  {240, 3, 1000, 4, 140, 100},
                 {240, 200, 600, 2, 140, 100}};
    for (const auto& one : cases) {
        for (const bool with_rule : {false, true}) {
            Case input(one.n_keys, one.n_queries, one.key_dim, one.k, 7);
            input.with_rule = with_rule;
            input.relative_margin = with_rule ? 0.01f : 0.0f;
            cuda_on_cpu::set_seed(static_cast<std::uint64_t>(one.n_keys));
            const Found found = scan(input, one.chunk, one.n_before);
            EXPECT(found.n_nonfinite == 0);
            expect_brute_force(input, found, with_rule, input.all_finite());
        }
    }
}

// Blocks and threads in any order, lists of any length, chunks of any size.
void test_schedule_and_lists_change_nothing() {
    Case input(700, 5, 300, 6, 3);  // more stages than the ring has
    input.relative_margin = 0.02f;
    cuda_on_cpu::set_seed(0);
    const Found first = scan(input, 700, 100);
    expect_brute_force(input, first, false, input.all_finite());
    for (std::uint64_t seed = 1; seed < 5; ++seed) {
        cuda_on_cpu::set_seed(seed);
        input.capacity = seed == 4 ? 1 : static_cast<std::int64_t>(20 * seed);
        EXPECT(same_bits(first, scan(input, seed % 2 == 0 ? 700 : 250, 100)));
    }
}

// With sums that are exact and no margin, the list holds the pairs that reach the k-th best score, and no others.
void test_lists_hold_what_reaches_the_limit(int n_parts) {
    Case input(900, 140, 40, 5, 13, n_parts);
    for (float& weight : input.queries) {
        weight += n_parts == 2 ? weight / 512 : 0.0f;  // 8 bits do not hold them, 16 do
    }
    const Found found = scan(input, 450, 450);
    expect_brute_force(input, found, false, input.all_finite());
    const Found before = state_after(input, 450);
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        const double floor = before.scores[static_cast<std::size_t>(query * input.k + input.k - 1)];
        std::int64_t wanted = 0;
        for (std::int64_t row = 450; row < 900; ++row) {
            wanted += input.exact(query, row) >= floor ? 1 : 0;
        }
        EXPECT(input.counts[static_cast<std::size_t>(query)] == wanted);
    }
}

// The margin counts with the whole norm of a key, and with little more.
void test_margins_count_with_the_norm(int n_parts) {
    Case input(600, 20, 90, 5, 17, n_parts);
    input.relative_margin = 0.1f;
    scan(input, 300, 300);
    const Found before = state_after(input, 300);
    for (std::int64_t query = 0; query < input.n_queries; ++query) {
        const double floor = before.scores[static_cast<std::size_t>(query * input.k + input.k - 1)];
        std::int64_t least = 0, most = 0;
        for (std::int64_t row = 300; row < 600; ++row) {
            const double score = input.exact(query, row), reach = input.norm(row) * input.margin(query);
            least += score + reach >= floor ? 1 : 0;
            most += score + reach * 1.0001 + 1e-5 >= floor ? 1 : 0;
        }
        EXPECT(input.counts[static_cast<std::size_t>(query)] >= least);
        EXPECT(input.counts[static_cast<std::size_t>(query)] <= most);
    }
}

// Beside an entry whose square is 2²⁴ float32 forgets the squares of all others that one thread adds to it: the norm is
// rounded up by what may have been forgotten, and the pair, whose margin reaches the limit by a hair, is listed.
void test_norms_hold_what_float32_forgets() {
    constexpr std::int64_t kWidth = 8192;
    Case input(3, 1, kWidth, 1, 5);
    std::fill(input.queries.begin(), input.queries.end(), 0.0f);
    input.queries[1] = 1.0f;
    std::fill(input.keys.begin(), input.keys.end(), BFloat16{0});
    input.keys[1] = cut(8.0f);  // the best so far, and the limit
    for (std::int64_t row : {1, 2}) {
        for (std::int64_t j = 2; j < kWidth; ++j) {
            input.keys[static_cast<std::size_t>(row * input.stride + j)] = cut(0.94921875f);
        }
        input.keys[static_cast<std::size_t>(row * input.stride)] = cut(4096.0f);
    }
    input.relative_margin = static_cast<float>(8.0 / input.norm(1) * (1.0 + 1e-6));
    scan(input, 2, 1);
    EXPECT(input.counts[0] == 2);
}

void test_rows_that_are_not_finite_are_left_out_and_counted() {
    for (const std::int64_t capacity : {1000, 3}) {
        Case input(400, 3, 20, 8, 3);
        input.capacity = capacity;
        auto is_finite = input.all_finite();
        for (const std::size_t row : {17u, 18u, 399u}) {
            is_finite[row] = false;
            input.keys[row * static_cast<std::size_t>(input.stride) + row % 20] = {
                static_cast<std::uint16_t>(row == 18 ? 0xff80 : 0x7fc1)};
        }
        const Found found = scan(input, 150, 10);
        EXPECT(found.n_nonfinite == 3);
        EXPECT(found.first_nonfinite == 17);
        expect_brute_force(input, found, false, is_finite);
    }
}

// Such a product says nothing of the score: beyond float32 on the way, and below every limit at the end, though the
// score is the best of all. And the square of the norm is beyond float32, though the row is finite.
void test_products_that_overflow_are_scored_exactly() {
    Case input(300, 2, 80, 4, 29);
    input.relative_margin = 0x1p-16f;
    for (std::int64_t query = 0; query < 2; ++query) {
        input.queries[static_cast<std::size_t>(query * 80)] = 8.0f;
        input.queries[static_cast<std::size_t>(query * 80 + 79)] = -8.0f;
    }
    const auto huge = static_cast<std::size_t>(290 * input.stride);
    for (std::size_t j = 0; j < 80; ++j) {
        input.keys[huge + j] = cut(j == 0 || j == 79 ? 0x1p126f : 0.0f);
    }
    input.keys[huge + 1] = cut(0x1p98f);
    input.queries[1] = input.queries[81] = 4.0f;
    const Found found = scan(input, 150, 50);
    EXPECT(found.n_nonfinite == 0);
    EXPECT(found.ids[0] == 1290 && found.ids[4] == 1290);
    expect_brute_force(input, found, false, input.all_finite());
}

void test_a_query_without_margin_keeps_its_state() {
    Case input(50, 2, 8, 4, 1);
    input.queries[3] = std::numeric_limits<float>::quiet_NaN();  // its norm, and so its margin, is NaN
    input.relative_margin = 0.01f;
    const Found found = scan(input, 30);
    for (std::size_t place = 0; place < 4; ++place) {
        EXPECT(found.ids[place] == -1 && found.scores[place] == -kInfinity);
        EXPECT(found.ids[4 + place] >= 0);
    }
}

void test_the_tile_computes_little_that_nobody_asked_for() {
    for (const std::int64_t n_queries : {1, 127, 128, 129, 256, 257, 300, 400, 2000, 20000}) {
        const cuda::FusedTile tile = cuda::choose_fused_tile(n_queries);
        EXPECT(cuda::padded_queries(n_queries) % tile.queries == 0);
        EXPECT(cuda::padded_queries(n_queries) - n_queries < 128);
    }
    EXPECT(cuda::choose_fused_tile(100).queries == 128);
    EXPECT(cuda::choose_fused_tile(400).queries == 256);
}

void test_layouts_the_copy_engine_does_not_take_are_refused() {
    Case input(20, 2, 8, 3, 1);
    input.split_queries();
    Found found;
    const auto refused = [&](auto change) {
        cuda::FusedScan one = chunk_of(input, 0, 20, found);
        input.give_operands(one);
        EXPECT(cuda::can_fuse(one));
        change(one);
        EXPECT(!cuda::can_fuse(one));
        try {
            cuda::scan_fused(one, nullptr);
        } catch (const rep_fast::Error& error) {
            EXPECT(std::string(error.what()).find("use select_hits") != std::string::npos);
            return;
        }
        EXPECT(false);
    };
    refused([](cuda::FusedScan& one) { one.selection.keys.row_stride = 12; });
    refused([](cuda::FusedScan& one) { one.selection.keys.row_stride = 0; });
    refused([](cuda::FusedScan& one) { one.selection.keys.dtype = DType::kFloat16; });
    refused([](cuda::FusedScan& one) { one.factor = static_cast<const BFloat16*>(one.factor) + 1; });
}

}  // namespace

void test_fused_scan() {
    test_hits_are_exact();
    test_schedule_and_lists_change_nothing();
    for (const int n_parts : {1, 2}) {
        test_lists_hold_what_reaches_the_limit(n_parts);
        test_margins_count_with_the_norm(n_parts);
    }
    test_norms_hold_what_float32_forgets();
    test_rows_that_are_not_finite_are_left_out_and_counted();
    test_products_that_overflow_are_scored_exactly();
    test_a_query_without_margin_keeps_its_state();
    test_the_tile_computes_little_that_nobody_asked_for();
    test_layouts_the_copy_engine_does_not_take_are_refused();
}
