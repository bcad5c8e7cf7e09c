// Which pass of whitened_topk is chosen before the scan, and when int8 gives way during it.
#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "cpu/block_scan.h"
#include "cpu/pass_choice.h"
#include "cpu/query_packings.h"
#include "cpu/running_hits.h"
#include "cpu/whitened_topk.h"
#include "cpu/whitened_topk_kernels.h"
#include "scan_checks.h"
#include "tests.h"

namespace rep_fast::tests {
namespace {

// With a state whose k-th best of one score is `kth` for every query.
PassChoice pass_choice(const std::vector<BFloat16>& keys, const std::vector<float>& queries, std::int64_t key_dim,
                       CpuLevel level, ScanRates (*rates)(), double kth = kNone) {
    const ScanInput input{.keys = MatrixView<const BFloat16>{keys.data(), std::ssize(keys) / key_dim, key_dim, key_dim},
                          .queries = {queries.data(), std::ssize(queries) / key_dim, key_dim, key_dim}};
    State state(input.queries.rows, 1);
    std::fill(state.scores.begin(), state.scores.end(), kth);
    return choose_pass(input, state.view, at_level(whitened_topk_table(), level).kernels, rates);
}

// Widening and quantising cost nothing, scoring a pair again as much as 32 products of its length.
constexpr ScanRates rates_of(double float32, double bf16, double int8) {
    return {.float32 = float32, .bf16 = bf16, .int8 = int8, .widen = 1e9, .quantise = 1e9, .exact = 1.0 / 64.0};
}

// The margin beside the spread of the scores decides, among the passes that lead float32 clearly: independent
// coordinates need one product, queries blind to the keys' main direction need two, and where the scores hardly differ
// beside ‖k‖‖w‖, or are flushed, float32 it is. int8 serves where the k-th best stands far out.
void test_choice_of_the_pass(CpuLevel level) {
    constexpr std::int64_t kDim = 256;
    std::mt19937 generator(13);
    auto keys = random_numbers<BFloat16>(100 * kDim, generator);
    auto queries = random_numbers<float>(8 * kDim, generator);
    const auto twice_and_half = [] { return rates_of(1.0, 2.5, 0.0); };
    const auto with_int8 = [] { return rates_of(1.0, 0.5, 10.0); };
    const auto expect = [&](ScanPass wanted, ScanRates (*rates)(), double kth = kNone) {
        const ScanPass found = pass_choice(keys, queries, kDim, level, rates, kth).first;
        EXPECT(found == (level == CpuLevel::kAvx512Bf16 ? wanted : ScanPass::kFloat32));
    };
    const auto expect_reason = [&](PassReason wanted, ScanRates (*rates)(), double kth) {
        const PassReason found = pass_choice(keys, queries, kDim, level, rates, kth).reason;
        EXPECT(found == (level == CpuLevel::kAvx512Bf16 ? wanted : PassReason::kOnlyOne));
    };
    expect(ScanPass::kBf16, twice_and_half);
    expect(ScanPass::kBf16, [] { return rates_of(1.0, 1.2, 0.0); });
    expect(ScanPass::kFloat32, [] { return rates_of(1.0, 1.05, 0.0); });
    expect(ScanPass::kInt8, with_int8, 80.0);  // the scores' deviation is 16
    expect_reason(PassReason::kFastest, with_int8, 80.0);
    expect(ScanPass::kFloat32, with_int8, 20.0);
    expect(ScanPass::kFloat32, with_int8);  // the first of 100 keys: 2.3 deviations
    expect_reason(PassReason::kWideMargin, with_int8, kNone);
    const auto slow_quantiser = [] {
        ScanRates rates = rates_of(1.0, 0.5, 10.0);
        rates.quantise = 1.0 / 13.0;  // as long as 6.5 of the 8 queries' products in float32
        return rates;
    };
    expect(ScanPass::kFloat32, slow_quantiser, 80.0);
    expect_reason(PassReason::kFastest, slow_quantiser, 80.0);
    const auto cheap_scores = [] {
        ScanRates rates = rates_of(1.0, 0.5, 10.0);
        rates.exact = 1e3;
        return rates;
    };
    expect(ScanPass::kInt8, cheap_scores);  // then many survivors may come
    keys[3].bits = 0x7fc0;                  // a row and a query that `nonfinite` may leave out do not decide
    queries[3] = std::numeric_limits<float>::infinity();
    expect(ScanPass::kBf16, twice_and_half);
    expect(ScanPass::kInt8, with_int8, 80.0);
    keys[3].bits = 0;
    queries[3] = 0.0f;
    auto tiny_keys = keys;
    auto tiny_queries = queries;
    std::for_each(tiny_keys.begin(), tiny_keys.end(), [](BFloat16& key) { key = truncated(1e-19f * to_float(key)); });
    std::for_each(tiny_queries.begin(), tiny_queries.end(), [](float& query) { query *= 1e-19f; });
    EXPECT(pass_choice(tiny_keys, tiny_queries, kDim, level, twice_and_half).first == ScanPass::kFloat32);
    for (std::size_t row = 0; row < 100; ++row) {
        keys[row * kDim].bits = 0x44c8;  // 1600 in the first coordinate, where the queries are zero
    }
    for (std::size_t query = 0; query < 8; ++query) {
        queries[query * kDim] = 0.0f;
    }
    expect(ScanPass::kBf16Twice, twice_and_half);
    expect(ScanPass::kFloat32, [] { return rates_of(1.0, 2.0, 0.0); });
    for (std::size_t row = 0; row < 100; ++row) {
        keys[row * kDim].bits = 0x4b98;  // 2e7
    }
    expect(ScanPass::kFloat32, twice_and_half);
    const ScanRates rates = scan_rates();
    const bool has_dots = machine_cpu_level() == CpuLevel::kAvx512Bf16;
    EXPECT(rates.float32 > 0.0 && (rates.bf16 > 0.0) == has_dots && (rates.int8 > 0.0) == has_dots);
    EXPECT(rates.widen > 0.0 && rates.exact > 0.0 && (rates.quantise > 0.0) == has_dots);
}

// The int8 pass gives way where hardly any pair is ruled out, and no hit is lost; it stays while what survives can
// wait, and with wider margins unless a key more is worth no second score at all.
void test_int8_gives_way(CpuLevel level) {
    const WhitenedTopkKernels& kernels = at_level(whitened_topk_table(), level).kernels;
    if (kernels.int8_products == nullptr) {
        return;
    }
    constexpr std::int64_t kKeys = 2000, kQueries = 9, kDim = 70;
    std::mt19937 generator(17);
    auto keys = random_numbers<BFloat16>(kKeys * kDim, generator);
    const auto queries = random_numbers<float>(kQueries * kDim, generator);
    const ScanInput spread{.keys = MatrixView<const BFloat16>{keys.data(), kKeys, kDim, kDim},
                           .queries = {queries.data(), kQueries, kDim, kDim}};
    const auto int8_keys = [&](double kth, double largest_share) {
        State state(kQueries, 3);
        std::fill(state.scores.begin(), state.scores.end(), kth);
        std::fill(state.ids.begin(), state.ids.end(), 1'000'000);
        RunningHits hits(state.view, kPanelQueries);
        QueryPackings packings(spread.queries);
        BlockScan scan(
            spread, std::get<MatrixView<const BFloat16>>(spread.keys), packings,
            {.first = ScanPass::kInt8, .second = ScanPass::kFloat32, .largest_survivor_share = largest_share}, kernels,
            1);
        ScanWorker worker(hits, kPanelQueries);
        for (std::int64_t block = 0; block < scan.n_blocks(); ++block) {
            scan.block(block, worker);
        }
        scan.rescore(worker);
        const auto& passes_ran = worker.report.pass_keys;
        const auto given_up = worker.report.reason_keys[static_cast<std::size_t>(PassReason::kGaveUp)];
        EXPECT(given_up == passes_ran[static_cast<std::size_t>(ScanPass::kFloat32)]);
        EXPECT(passes_ran[static_cast<std::size_t>(ScanPass::kInt8)] +
                   passes_ran[static_cast<std::size_t>(ScanPass::kFloat32)] ==
               kKeys);
        if (kth == kNone) {
            merge_hits({&hits, 1}, state.view);
            expect_is_top(state, std::get<MatrixView<const BFloat16>>(spread.keys), spread.queries);
        }
        return passes_ran[static_cast<std::size_t>(ScanPass::kInt8)];
    };
    EXPECT(int8_keys(40.0, 0.02) == kKeys);
    EXPECT(int8_keys(kNone, 0.1) == kKeys);
    EXPECT(int8_keys(kNone, 0.0) == kKeys);
    const auto widen_margins = [&](float coordinate) {  // one more direction, the same for all
        for (std::int64_t i = 0; i < kKeys; ++i) {
            keys[static_cast<std::size_t>(i * kDim)] = truncated(coordinate);
        }
    };
    widen_margins(70.0f);
    EXPECT(int8_keys(kNone, 0.1) == kKeys);
    EXPECT(int8_keys(kNone, 0.0) < kKeys);
    widen_margins(1e4f);
    EXPECT(int8_keys(kNone, 0.1) == kBlockKeys);
}

// Against the definition, Σ min(1, k/i): harmonic numbers are logarithms up to 1/(2i) at both ends.
void test_expected_entries() {
    EXPECT(expected_entries(0.0, 4.0) == 0.0 && expected_entries(3.0, 4.0) == 3.0 && expected_entries(4.0, 4.0) == 4.0);
    for (const double n : {5.0, 100.0, 1e6}) {
        double one_by_one = 0.0;
        for (double i = 1.0; i <= n; i += 1.0) {
            one_by_one += std::min(1.0, 4.0 / i);
        }
        EXPECT(std::fabs(expected_entries(n, 4.0) - one_by_one) <= 4.0 * (1.0 / 8.0 + 1.0 / (2.0 * n)));
    }
}
}  // namespace

void test_pass_choice(CpuLevel level) {
    test_choice_of_the_pass(level);
    test_int8_gives_way(level);
    test_expected_entries();
}

}  // namespace rep_fast::tests
