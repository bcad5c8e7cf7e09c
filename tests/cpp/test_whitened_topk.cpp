#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "core/error.h"
#include "cpu/block_scan.h"
#include "cpu/packed_queries.h"
#include "cpu/pass_choice.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"
#include "scan_checks.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

// "auto" and every pass that runs here by name.
template <class T>
std::vector<std::optional<ScanPass>> passes(CpuLevel level) {
    std::vector<std::optional<ScanPass>> found = {std::nullopt};
    for (std::size_t pass = 0; pass < kScanPassNames.size(); ++pass) {
        const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), level).kernels;
        if (has_pass(kernels, static_cast<ScanPass>(pass), MatrixView<const T>{nullptr, 1, 1, 1})) {
            found.emplace_back(static_cast<ScanPass>(pass));
        }
    }
    EXPECT(level != CpuLevel::kAvx512Bf16 || found.size() == (std::is_same_v<T, BFloat16> ? 6 : 4));
    return found;
}

template <class T>
void test_shape(std::int64_t n_keys, std::int64_t n_queries, std::int64_t key_dim, std::int64_t k, CpuLevel level) {
    std::mt19937 generator(static_cast<unsigned>(n_keys * 31 + n_queries));
    const std::int64_t padding = n_keys % 3;
    const auto keys = random_numbers<T>(n_keys * (key_dim + padding) - padding, generator);
    const auto queries = random_numbers<float>(n_queries * key_dim, generator);
    const MatrixView<const T> key_view{keys.data(), n_keys, key_dim, key_dim + padding};
    ScanInput input{.keys = key_view, .queries = {queries.data(), n_queries, key_dim, key_dim}};
    for (const auto pass : passes<T>(level)) {
        for (const int n_threads : {1, 3}) {
            input.pass = pass;
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
                          .queries = {queries.data(), kQueries, kDim, kDim},
                          .pass = ScanPass::kFloat32};  // the choice by measured speed lets another share through
    // in a random order k(1 + ln(n/k)) ≈ 31 keys per query are among the best five when they come, but their bounds
    // rule one another out before anything is scored again
    EXPECT(whitened_topk(input, state.view, level, 1).n_rescored <= 6 * kQueries);
    // the same of a block that was seen before
    EXPECT(whitened_topk(input, state.view, level, 1).n_rescored <= 6 * kQueries);
}

// Numbers that bend every step of the error bound: any exponent, subnormal ones included, cancelling sums, zero rows
// and scores that tie. Whatever a pass makes of them, the result is the definition's.
void test_hostile_numbers(CpuLevel level) {
    constexpr std::int64_t kKeys = 211, kQueries = 37, kDim = 301;
    std::mt19937 generator(11);
    std::vector<BFloat16> keys(kKeys * kDim);
    std::vector<float> queries(kQueries * kDim);
    for (const auto& [low, high] : {std::pair(0, 30), std::pair(0, 127), std::pair(90, 160), std::pair(120, 190)}) {
        std::uniform_int_distribution<unsigned> exponent(static_cast<unsigned>(low), static_cast<unsigned>(high));
        for (BFloat16& key : keys) {
            key.bits = static_cast<std::uint16_t>((generator() & 0x807fu) | exponent(generator) << 7);
        }
        for (float& query : queries) {
            query =
                std::bit_cast<float>(static_cast<std::uint32_t>(generator() & 0x807fffffu) | exponent(generator) << 23);
        }
        std::fill(keys.begin(), keys.begin() + 2 * kDim, BFloat16{0});
        std::copy(keys.begin() + 5 * kDim, keys.begin() + 6 * kDim, keys.begin() + 100 * kDim);
        for (std::int64_t j = 0; j + 1 < kDim; j += 2) {  // row 7 against query 3: sums that cancel
            keys[7 * kDim + j + 1] = {static_cast<std::uint16_t>(keys[7 * kDim + j].bits ^ 0x8000u)};
            queries[3 * kDim + j + 1] = std::nextafter(queries[3 * kDim + j], 0.0f);
        }
        const MatrixView<const BFloat16> view{keys.data(), kKeys, kDim, kDim};
        ScanInput input{.keys = view, .queries = {queries.data(), kQueries, kDim, kDim}};
        for (const auto pass : passes<BFloat16>(level)) {
            input.pass = pass;
            State state(kQueries, 9);
            whitened_topk(input, state.view, level, 2);
            expect_is_top(state, view, input.queries);
        }
    }
}

// The nearest bfloat16 of a query near the largest float32 is infinite; the pair has to survive as NaN.
void test_halves_that_overflow(CpuLevel level) {
    std::mt19937 generator(12);
    auto keys = random_numbers<BFloat16>(40 * 6, generator);
    auto queries = random_numbers<float>(2 * 6, generator);
    queries[2] = std::numeric_limits<float>::max();
    for (std::size_t row = 0; row < 40; ++row) {
        keys[row * 6 + 2].bits = static_cast<std::uint16_t>((row % 2 << 15) | (row % 5 << 7));  // 0, ±tiny
    }
    const MatrixView<const BFloat16> view{keys.data(), 40, 6, 6};
    ScanInput input{.keys = view, .queries = {queries.data(), 2, 6, 6}};
    for (const auto pass : passes<BFloat16>(level)) {
        input.pass = pass;
        State state(2, 4);
        whitened_topk(input, state.view, level, 1);
        expect_is_top(state, view, input.queries);
    }
}

// Keys whose large entries cancel come first, and every float32 or int8 sum takes some of them for better than the
// small keys behind them, which are the best: what a pair is expected to score must be its own lower bound.
void test_pairs_that_seem_better(CpuLevel level) {
    constexpr std::int64_t kLarge = 40, kSmall = 3, kDim = 5;
    std::vector<BFloat16> keys;
    for (std::int64_t i = 0; i < kLarge; ++i) {  // 1 − 2⁻⁸, but float32 rounds c + 1 − 2⁻⁸ to c + 1
        const float c = 0x1p16f + static_cast<float>(i) * 0x1p9f;
        for (const float entry : {c, 1.0f - 0x1p-8f, -c, 0.0f, 0x1p18f}) {
            keys.push_back(truncated(entry));
        }
    }
    for (std::int64_t i = 0; i < kSmall; ++i) {  // 1 − 2⁻⁹
        for (const float entry : {0.0f, 1.0f, 0.0f, -0x1p-9f, 0.0f}) {
            keys.push_back(truncated(entry));
        }
    }
    // a chunk of queries without any margin, then one that has; its zero meets the entry that sets the steps of int8
    std::vector<float> queries(kChunkQueries * kDim);
    queries.insert(queries.end(), {1.0f, 1.0f, 1.0f, 1.0f, 0.0f});
    const MatrixView<const BFloat16> view{keys.data(), kLarge + kSmall, kDim, kDim};
    ScanInput input{.keys = view, .queries = {queries.data(), kChunkQueries + 1, kDim, kDim}};
    for (const auto pass : passes<BFloat16>(level)) {
        input.pass = pass;
        for (std::uint64_t seed = 0; seed < 8; ++seed) {
            input.dither.seed = seed;
            State state(input.queries.rows, kSmall);
            whitened_topk(input, state.view, level, 1);
            expect_is_top(state, view, input.queries);
        }
    }
}

// The fast scores of up to kTileKeys keys by up to kPanelQueries queries, as the scan makes them.
std::vector<float> fast_scores(const PackedQueries& packed, MatrixView<const BFloat16> keys,
                               const WhitenedTopkKernels& kernels) {
    std::vector<float> scores(kTileKeys * kPanelQueries);
    std::vector<float> widened(kTileKeys * kWidenedStride);
    for (std::int64_t depth = 0; depth < keys.cols; depth += kBlockDepth) {
        const std::int64_t n = std::min(kBlockDepth, keys.cols - depth);
        if (packed.pass() == ScanPass::kFloat32) {
            for (std::int64_t row = 0; row < keys.rows; ++row) {
                kernels.rows.bf16.widen(keys.row(row) + depth, n, widened.data() + row * kWidenedStride);
            }
            kernels.float32.multiply(widened.data(), 1, packed.panel(0, depth), 1, packed.panel_stride(), n,
                                     scores.data(), kPanelQueries, depth == 0);
        } else {
            const Bf16Keys block = {keys.row(0) + depth, keys.row_stride, keys.rows, n, keys.cols - depth - n};
            kernels.bf16_products->multiply(block, packed.bf16_panels(0, depth), 1, scores.data(), kPanelQueries,
                                            depth == 0);
        }
    }
    return scores;
}

// No pair may be ruled out by a threshold that its true score reaches, nor be taken for better than it is.
void expect_margins_hold(const std::vector<BFloat16>& keys, const std::vector<float>& queries, std::int64_t key_dim,
                         CpuLevel level) {
    const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), level).kernels;
    const MatrixView<const BFloat16> key_view{keys.data(), std::ssize(keys) / key_dim, key_dim, key_dim};
    const MatrixView<const float> query_view{queries.data(), std::ssize(queries) / key_dim, key_dim, key_dim};
    for (const ScanPass pass : {ScanPass::kFloat32, ScanPass::kBf16, ScanPass::kBf16Twice}) {
        if (pass != ScanPass::kFloat32 && kernels.bf16_products == nullptr) {
            continue;
        }
        const PackedQueries packed(query_view, pass, 1);
        const std::vector<float> scores = fast_scores(packed, key_view, kernels);
        for (std::int64_t row = 0; row < key_view.rows; ++row) {
            std::vector<float> thresholds(kPanelQueries, std::numeric_limits<float>::infinity());
            long double exact_scores[kPanelQueries];
            double square = 0.0;
            for (std::int64_t query = 0; query < query_view.rows; ++query) {
                long double exact = 0.0L;
                for (std::int64_t j = 0; j < key_dim; ++j) {
                    exact += static_cast<long double>(to_float(key_view.row(row)[j])) *
                             static_cast<long double>(query_view.row(query)[j]);
                }
                thresholds[static_cast<std::size_t>(query)] = round_down(static_cast<double>(exact));
                exact_scores[query] = exact;
            }
            for (std::int64_t j = 0; j < key_dim; ++j) {
                const auto key = static_cast<double>(to_float(key_view.row(row)[j]));
                square += key * key;
            }
            float bounds[kPanelQueries];
            std::int32_t survivors[kPanelQueries];
            const std::int64_t n_survivors =
                kernels.float32.select(scores.data() + row * kPanelQueries, packed.margins(), thresholds.data(),
                                       packed.key_norm(square), packed.underflow(), kPanelQueries, bounds, survivors);
            for (std::int32_t query = 0; query < query_view.rows; ++query) {
                EXPECT(std::find(survivors, survivors + n_survivors, query) != survivors + n_survivors);
                const float score = scores[static_cast<std::size_t>(row * kPanelQueries + query)];
                const double least = packed.least_score(score, query, packed.key_norm(square));
                EXPECT(std::isnan(least) || static_cast<long double>(least) <= exact_scores[query]);
            }
        }
    }
}

// Each kind of data makes one term of the margin necessary: without it, pairs are lost.
void test_margins(CpuLevel level) {
    std::mt19937 generator(21);
    std::normal_distribution<float> normal;
    const auto numbers = [&](std::int64_t n, float scale) {
        std::vector<float> found(static_cast<std::size_t>(n));
        constexpr float kLargest = std::numeric_limits<float>::max();
        std::generate(found.begin(), found.end(),
                      [&] { return std::clamp(scale * normal(generator), -kLargest, kLargest); });
        return found;
    };
    const auto as_keys = [](const std::vector<float>& values) {
        std::vector<BFloat16> keys(values.size());
        std::transform(values.begin(), values.end(), keys.begin(), truncated);
        return keys;
    };
    for (const std::int64_t dim : {7, 256, 301, 600}) {
        for (const auto& [key_scale, query_scale] : {
                 std::pair(1.0f, 1.0f),      // the queries' rounding
                 std::pair(1e-22f, 1e-22f),  // float32 products that are subnormal
                 std::pair(1e-19f, 1e-20f),  // products that vdpbf16ps flushes
                 std::pair(5e-39f, 1e6f),    // keys that it reads as zero
                 std::pair(1e6f, 5e-39f),    // queries that it reads as zero
                 std::pair(1e19f, 1e19f),    // partial sums that overflow
                 std::pair(1e-3f, 2e38f),    // queries whose high half overflows
             }) {
            expect_margins_hold(as_keys(numbers(kTileKeys * dim, key_scale)), numbers(kPanelQueries * dim, query_scale),
                                dim, level);
        }
        // exact in every pass but for the additions: large terms that cancel around small ones
        auto keys = as_keys(numbers(kTileKeys * dim, 64.0f));
        auto queries = numbers(kPanelQueries * dim, 1.0f);
        for (float& query : queries) {
            query = to_float(truncated(query));
        }
        const std::int64_t half = dim / 2;
        for (std::int64_t row = 0; row < kTileKeys; ++row) {
            for (std::int64_t j = 0; j < half; ++j) {
                keys[static_cast<std::size_t>(row * dim + half + j)].bits =
                    keys[static_cast<std::size_t>(row * dim + j)].bits ^ 0x8000u;
            }
            for (std::int64_t j = half - half / 8; j < half + half / 8; ++j) {
                keys[static_cast<std::size_t>(row * dim + j)] = truncated(1e-4f * normal(generator));
            }
        }
        for (std::int64_t query = 0; query < kPanelQueries; ++query) {
            float* const from = queries.data() + query * dim;
            std::copy(from, from + half, from + half);
        }
        expect_margins_hold(keys, queries, dim, level);
    }
}

template <class T>
void test_nonfinite(T infinity, T nan, CpuLevel level) {
    std::mt19937 generator(9);
    auto keys = random_numbers<T>(300 * 20, generator);
    auto queries = random_numbers<float>(3 * 20, generator);
    keys[250 * 20 + 19] = infinity;
    keys[123 * 20] = nan;
    queries[25] = std::numeric_limits<float>::quiet_NaN();
    ScanInput input{.keys = MatrixView<const T>{keys.data(), 300, 20, 20}, .queries = {queries.data(), 3, 20, 20}};
    for (const auto pass : passes<T>(level)) {
        input.pass = pass;
        State state(3, 300);
        const ScanReport report = whitened_topk(input, state.view, level, 2);
        EXPECT(report.n_nonfinite_keys == 2 && report.first_nonfinite_key == 123);
        EXPECT(!state.dropped[0] && state.dropped[1] && !state.dropped[2]);
        EXPECT(state.view.ids.row(0)[297] >= 0 && state.view.ids.row(0)[298] == -1);
        EXPECT(state.view.ids.row(1)[0] == -1);
    }
}

void test_refuses_a_pass_that_is_not_there(CpuLevel level) {
    const std::vector<BFloat16> keys(12);
    const std::vector<float> queries(6);
    State state(2, 1);
    const ScanInput input{.keys = MatrixView<const BFloat16>{keys.data(), 4, 3, 3},
                          .queries = {queries.data(), 2, 3, 3},
                          .pass = ScanPass::kBf16};
    try {
        whitened_topk(input, state.view, level, 1);
        EXPECT(level == CpuLevel::kAvx512Bf16);
    } catch (const Error& error) {
        EXPECT(level != CpuLevel::kAvx512Bf16 && std::strstr(error.what(), "use precision auto") != nullptr);
    }
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
    test_shape<BFloat16>(100, 529, 12, 5, level);
    test_hostile_numbers(level);
    test_pairs_that_seem_better(level);
    test_halves_that_overflow(level);
    test_margins(level);
    test_survivors_are_few(level);
    test_nonfinite(std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN(), level);
    test_nonfinite(BFloat16{0xff80}, BFloat16{0x7fc1}, level);
    test_refuses_a_pass_that_is_not_there(level);
    test_refuses_sizes_that_do_not_fit(level);
}

}  // namespace rep_fast::tests
